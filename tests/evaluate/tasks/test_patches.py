from unittest import mock

from lm_eval import utils

from lightlm.evaluate.tasks.patches import compiled_once


def test_templates_are_compiled_once_and_say_the_same():
    documents = [{"ctx": f"A {i}", "endings": ["x", "y"]} for i in range(5)]
    template = "{{ctx}}: {{endings[1] | regex_replace('y', 'z')}}"
    before = [utils.apply_template(template, document) for document in documents]
    with mock.patch.object(utils.env, "compile", wraps=utils.env.compile) as compile_, compiled_once():
        assert [utils.apply_template(template, document) for document in documents] == before
    assert compile_.call_count == 1
    assert "from_string" not in vars(utils.env)
