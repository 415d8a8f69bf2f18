"""Prompts as conversations, compared with lm-eval's `hf` on the same folder, and what `lightlm eval` says of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from lightlm.checkpoint import LoadedModel
from lightlm.cli.evaluate import evaluate
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.convert.load import load_pretrained
from lightlm.data.chat.template import CHATML, CHATML_TOKENS
from lightlm.errors import LightLMError, UsageError
from lightlm.evaluate.compare.comparison import answers_of, compare
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.tasks import index
from tests.evaluate.test_harness import instances
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer, write_task, write_world

app = typer.Typer()
app.command()(evaluate)

# A template that writes a beginning-of-text token itself, trims contents, and refuses the system's messages.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' ~ message.role ~ ': ' ~ message.content | trim ~ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)
TALKS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " The cat sat "}],
    [
        {"role": "user", "content": "The cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on <|im_end|> the mat"},
    ],
]
BEGUN = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "The answer is "}]


def write_chat_model(folder: Path, template: str | None, **names: str) -> Path:
    tokenizer = tiny_tokenizer().with_special_tokens([*CHATML_TOKENS, "<s>"])
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "bos_token": "<s>"} | names
    settings |= {} if template is None else {"chat_template": template}
    ids = {name: tokenizer.id_of(settings[name]) for name in ("eos_token", "bos_token")}
    tokenizer = tokenizer.used_as(ids["bos_token"], False, settings, {"eos_token_id": ids["eos_token"]})
    export_huggingface(LoadedModel(tiny_model(tokenizer, max_seq_len=128), tokenizer, folder), folder)
    return folder


@pytest.mark.parametrize("template", [CHATML, STRICT], ids=["chatml", "strict"])
def test_conversations_are_written_encoded_and_scored_as_lm_evals_own_model_does(tmp_path: Path, template: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = write_chat_model(tmp_path / "hf", template)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    ours = LightLM(load_pretrained(folder))
    prompts = [ours.apply_chat_template(talk) for talk in TALKS]
    assert prompts == [theirs.apply_chat_template(talk) for talk in TALKS]
    begun = ours.apply_chat_template(BEGUN, add_generation_prompt=False)
    assert begun == theirs.apply_chat_template(BEGUN, add_generation_prompt=False)
    assert begun.rstrip().endswith("The answer is")
    assert ours.chat_template(True) == theirs.chat_template(True) == template
    for prompt in [*prompts, begun]:
        assert ours.tok_encode(prompt) == theirs.tok_encode(prompt)
    pairs = [(prompt, answer) for prompt in [*prompts, begun] for answer in ("sat", " on the mat")]
    for mine, hf in zip(*(m.loglikelihood(instances("loglikelihood", pairs)) for m in (ours, theirs)), strict=True):
        assert mine == (pytest.approx(hf[0], abs=1e-3), hf[1])
    asked = [(prompt, {"until": ["\n\n"], "max_gen_toks": 12}) for prompt in prompts]
    answers = [m.generate_until(instances("generate_until", asked)) for m in (ours, theirs)]
    assert answers[0] == answers[1]


def test_documents_are_no_conversations(tmp_path: Path) -> None:
    lm = LightLM(load_pretrained(write_chat_model(tmp_path / "hf", CHATML)))
    text = instances("loglikelihood_rolling", [("The <|im_end|> cat",)])
    before = lm.loglikelihood_rolling(text)
    lm.apply_chat_template(TALKS[0])
    assert lm.loglikelihood_rolling(text) == before


def test_a_template_that_refuses_a_conversation_without_a_system_message_is_an_error(tmp_path: Path) -> None:
    lm = LightLM(load_pretrained(write_chat_model(tmp_path / "hf", STRICT.replace("'system'", "'user'"))))
    with pytest.raises(LightLMError, match="no system"):
        lm.apply_chat_template(TALKS[1])
    strict = LightLM(load_pretrained(write_chat_model(tmp_path / "strict", STRICT)))
    with pytest.raises(LightLMError, match="no system"):  # nothing would be left of it
        strict.apply_chat_template([{"role": "system", "content": "Be brief."}])
    with pytest.raises(UsageError, match="'tool_use' cannot be chosen"):
        lm.chat_template("tool_use")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Score the model in hf/ at a task of three questions, with results in out/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index, "stock_tasks", dict)  # skips lm-eval's index: 5 s

    def score(*arguments: str, description: str = "") -> Result:
        changes = {"fewshot_config": "{sampler: first_n}", "description": json.dumps(description)}
        write_task(tmp_path / "t", **changes)
        command = ["hf", "--tasks", "own", "--include-path", "t", "--log-samples", "--out", "out", *arguments]
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, command)

    return score


def prompt_of(name: str) -> str:
    """The first document's prompt in a file of samples."""
    first = json.loads(Path(f"out/{name}.samples_own.jsonl").read_text().splitlines()[0])
    return first["arguments"]["gen_args_0"]["arg_0"]


def test_prompts_are_those_of_lm_eval_and_the_results_say_how_they_were_written(run: Callable[..., Result]) -> None:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    folder = write_chat_model(Path("hf"), CHATML)
    options = ["--apply-chat-template", "--no-fewshot-as-multiturn", "--system-instruction", "Be brief."]
    result = run(*options, "--num-fewshot", "1", "--limit", "2", description="Colors.")
    assert result.exit_code == 0, result.output
    [file] = Path("out").glob("*.samples_own.jsonl")
    name = file.name.removesuffix(".samples_own.jsonl")
    assert "_1shot_chat_singleturn_system~" in name
    result = run("--apply-chat-template", "--num-fewshot", "1", description="Colors.")
    assert result.exit_code == 0, result.output

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu")
    task = ConfigurableTask(config=yaml.safe_load(Path("t/own.yaml").read_text()) | {"num_fewshot": 1})
    for written, system, turns in ((name, "Be brief.", False), ("hf_own_1shot_chat_t", None, True)):
        task.build_all_requests(
            limit=1,
            system_instruction=system,
            apply_chat_template=True,
            fewshot_as_multiturn=turns,
            chat_template=theirs.apply_chat_template,
            tokenizer_name=theirs.tokenizer_name,
        )
        assert prompt_of(written) == task.instances[0].args[0]
    stored = json.loads(Path(f"out/{name}.json").read_text())
    assert stored["chat_template"] == CHATML
    assert (stored["system_instruction"], stored["fewshot_as_multiturn"]) == ("Be brief.", False)
    meta = json.loads(Path(f"out/{name}.meta.json").read_text())
    assert (meta["apply_chat_template"], meta["system_instruction"]) == (True, "Be brief.")


def test_scores_with_and_without_a_template_are_not_compared(run: Callable[..., Result]) -> None:
    write_chat_model(Path("hf"), CHATML)
    found = []
    for arguments in ([], ["--apply-chat-template"], ["--system-instruction", "Be brief."]):
        assert run(*arguments).exit_code == 0
    for path in sorted(Path("out").glob("*own*.meta.json"), key=lambda path: path.stat().st_mtime_ns):
        results = json.loads(path.with_name(path.name.replace(".meta", "")).read_text())
        found.append(answers_of(path.name, results, [], json.loads(path.read_text()))[0])
    plain, chat, system = found
    assert compare(plain, chat).reason == "prompts as text and with a chat template"
    assert compare(plain, system).reason == "prompts as text and system instruction 'Be brief.'"
    assert "no scores per document" in compare(chat, chat).reason


def test_what_cannot_be_asked_is_one_message(run: Callable[..., Result]) -> None:
    write_chat_model(Path("hf"), STRICT)
    result = run("--apply-chat-template", "--system-instruction", "Be brief.")
    assert "does not take these messages: no system; leave out --system-instruction" in str(result.exception)
    assert run("--apply-chat-template", description="Colors.").exit_code == 0  # as lm-eval, without it
    result = run("--fewshot-as-multiturn")
    assert "give --apply-chat-template too" in str(result.exception)


def test_a_model_without_a_template_is_refused(run: Callable[..., Result]) -> None:
    write_world(Path())
    result = CliRunner().invoke(app, ["runs/demo", "--tasks", "quiz.yaml", "--apply-chat-template"])
    assert isinstance(result.exception, UsageError)
    assert "demo" in str(result.exception)
    assert "has no chat template" in str(result.exception)
    assert "leave out --apply-chat-template" in str(result.exception)
