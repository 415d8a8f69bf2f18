"""Mistakes in tasks are named before anything is scored, and a failing task costs only its own results."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from lm_eval.api.instance import Instance
from typer.testing import CliRunner, Result

from lightlm.checkpoint import write_checkpoint
from lightlm.cli.evaluate import evaluate
from lightlm.errors import DataError, LightLMError, UsageError
from lightlm.evaluate import runner
from lightlm.evaluate.generation import Generation
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.tasks import index
from lightlm.generate.engine import generate
from lightlm.generate.sampling import GREEDY, Sampling
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer, write_task, write_world

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """runs/demo, and a function that writes the task `own` in t/: its documents, and changes to its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index, "stock_tasks", dict)  # skips lm-eval's index: 5 s
    write_world(tmp_path)
    Path("t").mkdir()

    def task(name: str = "own", docs: list[dict] | None = None, **changes: str) -> None:
        write_task(tmp_path / "t" / name, name, docs, **changes)

    return task


def run(*arguments: str, tasks: str = "own") -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--tasks", tasks, "--include-path", "t", *arguments])


GENERATED = {"output_type": "generate_until", "doc_to_choice": "", "doc_to_target": "red",
             "metric_list": "[{metric: exact_match}]"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ["--num-fewshot", "5"], "it has 3 examples for its prompts, but 5 were asked for"),
        ({**GENERATED, "generation_kwargs": "{max_gen_toks: 40}"}, [], "40 new tokens, but the model's context holds"),
        ({**GENERATED, "generation_kwargs": "{top_p: 2, do_sample: true}"}, [], "top-p must be above 0"),
        ({**GENERATED, "generation_kwargs": "{max_gen_toks: many}"}, [], "generation_kwargs: "),
        ({"metric_list": "[{metric: accc, aggregation: mean, higher_is_better: true}]"}, [], "no metric 'accc'"),
        ({"metric_list": "[{metric: accc}]"}, [], "no metric 'accc'"),
        ({"metric_list": "[{metric: bleu}]"}, [], "bleu is not computed for output_type multiple_choice"),
        ({"validation_split": "dev"}, [], "its data has no split 'dev'; it has train, validation"),
        ({"doc_to_text": '"{{question}}"'}, [], "'question' is undefined"),
        ({"filter_list": "[{name: x, filter: [{function: nothing}]}]"}, [], "there is no filter 'nothing'"),
        ({"doc_to_target": "7"}, [], "document 0: the target 7 is not one of its 2 choices"),
    ],
)
def test_what_is_wrong_with_a_task_is_known_before_anything_is_scored(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch, changes: dict, arguments: list[str], words: str
) -> None:
    for method in ("_score", "_generate"):
        monkeypatch.setattr(LightLM, method, lambda *_, **__: pytest.fail("a task was scored"))
    write(**changes)
    done = run(*arguments)
    assert isinstance(done.exception, DataError), done.exception
    assert str(done.exception).startswith("the task own cannot be scored: ")
    assert words in str(done.exception)


def test_an_answer_longer_than_the_context_is_noted_and_scored(write: Callable[..., None]) -> None:
    long = {"q": "Which color?", "c": ["red " * 60, "blue"], "a": 1}
    write(docs=[long])
    done = run()
    assert done.exit_code == 0, done.output
    assert "Note: own: document 0: an answer has" in done.stderr
    assert "but the context holds 40; it is scored in windows" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"a data set cannot be read:\n  json  for own: it holds no documents: .*d\.jsonl"),
        (
            '{"q": "a", "c": ["red", "blue"], "a": 0}\n{"q": "b", "c": [], "a": 0}\n',
            "own cannot be scored: document 1: doc_to_choice gives no choices",
        ),
    ],
    ids=["no documents", "no choices"],
)
def test_documents_without_what_they_need_are_named(write: Callable[..., None], content: str, words: str) -> None:
    write()
    Path("t/own/d.jsonl").write_text(content)
    done = run()
    assert isinstance(done.exception, DataError), done.exception
    assert re.search(words, str(done.exception)), done.exception


def test_the_mistakes_of_all_tasks_are_one_message_with_their_documents(write: Callable[..., None]) -> None:
    good = {"q": "What?", "c": ["red", "blue"], "a": 0}
    write("first", [good, {**good, "c": ["red", ""]}, {**good, "c": ["", "red"]}], target_delimiter='""')
    write("second", [good, {**good, "a": 2}])
    done = run(tasks="heldout,first,second")
    message = str(done.exception)
    assert "2 tasks cannot be scored:" in message
    assert (
        "first: document 1: its choices ['red', ''] include an empty text; check doc_to_choice (and 1 other" in message
    )
    assert "second: document 1: the target 2 is not one of its 2 choices" in message
    assert not Path("runs/demo/eval").exists()


def test_a_task_that_fails_costs_only_its_own_results(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("first")
    write("second")
    run(tasks="first,second")
    both = Path("runs/demo/eval/step_000007_first+second_t.json")
    before = both.read_bytes()
    scored = LightLM._loglikelihood_tokens

    def failing(self: LightLM, requests: list, **options: object) -> list:
        if self._task == "first: ":
            raise MemoryError("no room")
        return scored(self, requests, **options)

    monkeypatch.setattr(LightLM, "_loglikelihood_tokens", failing)
    done = run("--json", tasks="first,second")
    assert isinstance(done.exception, LightLMError)
    assert str(done.exception) == "the task first cannot be scored: MemoryError: no room"
    [model] = json.loads(done.stdout)["models"]
    assert {row["task"] for row in model["results"]} == {"second"}
    assert model["failed"] == {"first": "MemoryError: no room"}
    assert Path(model["file"]).name == "step_000007_second_t.json"
    assert both.read_bytes() == before  # the results of all tasks are not replaced


def test_a_document_whose_answer_cannot_be_judged_is_named(write: Callable[..., None]) -> None:
    write("first")
    Path("t/own").mkdir()
    judge = "def judge(doc, results):\n    return {'acc': 1 / (doc['a'] - 2)}\n"
    Path("t/own/judge.py").write_text(judge)
    text = Path("t/first/first.yaml").read_text().replace("task: first", "task: own").replace("t/first/d", "t/own/d")
    Path("t/own/own.yaml").write_text(text + "\nprocess_results: !function judge.judge\n")
    docs = [{"q": "What?", "c": ["red", "blue", "no"], "a": n} for n in range(3)]
    Path("t/own/d.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    done = run(tasks="first,own")
    assert "the task own cannot be scored: document 2: ZeroDivisionError" in str(done.exception)
    assert "first" in done.stdout


def test_an_interruption_keeps_the_finished_tasks(write: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    write("first")
    write("second")
    monkeypatch.setattr(runner, "_SAVE_SECONDS", 0.0)
    scored, kept = LightLM._loglikelihood_tokens, []

    def interrupted(self: LightLM, requests: list, **options: object) -> list:
        if self._task == "second: ":
            kept.extend(path.name for path in Path("runs/demo/eval").glob("*.partial.json"))  # if it were killed
            raise KeyboardInterrupt
        return scored(self, requests, **options)

    monkeypatch.setattr(LightLM, "_loglikelihood_tokens", interrupted)
    done = run(tasks="first,second")
    assert done.exit_code == 130
    assert "interrupted; the scores are those of the finished tasks" in done.stderr
    assert kept == ["step_000007_first+second_t.partial.json"]
    names = {path.name.partition(".")[0] for path in Path("runs/demo/eval").iterdir()}
    assert names == {"step_000007_first_t"}
    whole = Path("runs/demo/eval/step_000007_first_t.json")
    before = whole.read_bytes()
    done = run(tasks="first,second")  # the first alone is not replaced by what may be a part of it
    assert "step_000007_first+second_t.partial.json" in done.stderr
    assert whole.read_bytes() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_results_of_some_tasks_never_replace_a_file_of_all(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write("first")
    write("second")
    arguments = ("--out", "r.json", "--log-samples")
    assert run(*arguments, tasks="first,second").exit_code == 0
    before = Path("r.json").read_bytes()
    scored = LightLM._loglikelihood_tokens

    def failing(self: LightLM, requests: list, **options: object) -> list:
        if self._task == "second: ":
            raise error
        return scored(self, requests, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LightLM, "_loglikelihood_tokens", failing)
        done = run(*arguments, "--overwrite", tasks="first,second")
    assert done.exit_code == (130 if error is KeyboardInterrupt else 1)
    assert "s, r.partial.json" in done.stderr
    assert json.loads(Path("r.partial.json").read_text())["results"].keys() == {"first"}
    assert Path("r.json").read_bytes() == before
    for path in Path(".").glob("r.[!p]*"):
        path.unlink()
    assert run(*arguments, tasks="first,second").exit_code == 0  # the partial results do not stand in its way
    assert {path.name.split(".")[1] for path in Path(".").glob("r.*")} == {
        "json", "meta", "documents", "samples_first", "samples_second",
    }  # fmt: skip


def test_cut_prompts_are_counted_in_table_and_facts(write: Callable[..., None]) -> None:
    write(docs=[{"q": f"{n} cats sat on the mat. " * 30, "c": ["red", "blue"], "a": 0} for n in range(3)])
    done = run("--num-fewshot", "1")
    assert "own: the beginning of 6 of 6 requests was cut to fit the model's context" in " ".join(done.stdout.split())
    [path] = Path("runs/demo/eval").glob("*.meta.json")
    facts = json.loads(path.read_text())
    cut = facts["truncated"]["own"]
    assert (cut["requests"], cut["cut"]) == (6, 6)
    assert cut["tokens"] <= 6 * cut["most"]
    assert facts["chances"] == {"own": 0.5}


def test_settings_of_generation_have_a_meaning_or_are_named(write: Callable[..., None]) -> None:
    write(**GENERATED, generation_kwargs="{until: ['.'], max_gen_toks: 4, num_beams: 4, eta_cutoff: 0.1}")
    done = run()
    assert done.exit_code == 0, done.exception
    assert done.stderr.count("num_beams: 4, eta_cutoff: 0.1 is not supported and ignored") == 1
    for neutral in ({"top_k": 0}, {"num_beams": 1}, {"top_k": 50}, {"repetition_penalty": 1.0}, {"use_cache": True}):
        found = Generation.of({"until": ["."], "do_sample": False, **neutral})
        assert (found.sampling, found.ignored, found.new_tokens) == (GREEDY, (), 256)
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert Generation.of({**drawn, "top_k": 0}).sampling == Sampling(0.7, None, 0.9)
    assert Generation.of({**drawn, "top_k": 5, "max_new_tokens": 3}).new_tokens == 3
    assert Generation.of({**drawn, "top_k": None}).sampling == Sampling(0.7, None, 0.9)
    assert Generation.of({"temperature": 0.7}).sampling == Sampling(0.7, 50, 1.0)
    assert Generation.of({**drawn, "min_p": 0.1, "typical_p": 0.8}).sampling == Sampling(
        0.7, 50, 0.9, min_p=0.1, typical_p=0.8
    )
    greedy = Generation.of({"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_p": 0.1})
    assert greedy.sampling == Sampling(0.0, repetition_penalty=1.3, no_repeat_ngram=3)
    assert Generation.of({"max_length": 30}).limit(20) == 10
    with pytest.raises(UsageError, match="until"):
        Generation.of({"until": [3]})


def test_what_a_task_leaves_open_is_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    found = Generation.of({"do_sample": True}).sampling
    for name in ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty"):
        assert getattr(found, name) == defaults[name]


def test_drawn_answers_follow_the_models_generation_config_where_the_task_leaves_it_open() -> None:
    suggested = {"do_sample": True, "temperature": 0.1, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "max_length": 99}
    drawn = {"do_sample": True, "temperature": 0.7}
    found = Generation.of(drawn, suggested)
    assert (found.sampling, found.new_tokens, found.max_length) == (Sampling(0.7, 20, 0.8, min_p=0.05), 256, None)
    of_task = {"top_k": None, "top_p": 0.9, "min_p": None}
    assert Generation.of({**drawn, **of_task}, suggested).sampling == Sampling(0.7, None, 0.9)
    assert Generation.of({}, suggested).sampling == GREEDY
    with pytest.raises(UsageError, match=r"^generation_kwargs, top_p of the model's generation_config\.json: "):
        Generation.of(drawn, {"top_p": 2.0})


def test_settings_of_the_model_that_answers_do_not_follow_are_named_once(write: Callable[..., None]) -> None:
    for name in ("own", "other"):
        write(name, **GENERATED, generation_kwargs="{until: ['.'], max_gen_toks: 4}")
    tokenizer = tiny_tokenizer()
    neutral = {"transformers_version": "4.40", "eos_token_id": tokenizer.end_of_text_id, "length_penalty": 1.0}
    imported = tokenizer.used_as(None, False, {}, {**neutral, "max_new_tokens": 2048, "num_beams": 4})
    model = tiny_model(tokenizer)
    write_checkpoint(Path("runs/demo"), 8, model.state_dict(), model.config, imported)
    done = run(tasks="own,other")
    assert done.exit_code == 0, done.exception
    said = " ".join(done.stderr.split())
    assert said.count("generation_config.json: max_new_tokens: 2048, num_beams: 4 is not supported and ignored") == 1


def test_a_special_token_among_the_stop_strings_ends_an_answer_as_in_lm_evals_hf(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from lightlm.checkpoint import LoadedModel
    from lightlm.convert.huggingface.folder import export_huggingface
    from lightlm.convert.load import load_pretrained
    from lightlm.device import pick_device, pick_dtype

    tokenizer = tiny_tokenizer()
    export_huggingface(LoadedModel(tiny_model(tokenizer), tokenizer, Path("tiny")), tmp_path / "hf")
    lm = LightLM(str(tmp_path / "hf"), device="cpu", dtype="float32")
    prompt, free = "The cat", {"until": [], "max_gen_toks": 8, "do_sample": False}
    [completion] = generate(lm.model, [lm.tok_encode(prompt)], 8, GREEDY)
    ids = completion.ids
    # The third token becomes a special one, which decoding leaves out.
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    [old] = [name for name, index in vocabulary.items() if index == ids[2]]
    vocabulary["<|stop|>"] = vocabulary.pop(old)
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]]
    content["model"]["merges"] = [pair for pair in pairs if old not in (*pair, "".join(pair))]
    content["added_tokens"].append(
        {"id": ids[2], "content": "<|stop|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    )  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    target = pick_device("cpu")
    lm = LightLM(load_pretrained(str(tmp_path / "hf"), target, pick_dtype("float32", target)))
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=1)
    stopped = [Instance("generate_until", {}, (prompt, {**free, "until": ["<|stop|>"]}), 0)]
    assert lm.generate_until(stopped) == theirs.generate_until(stopped)
    going_on = [Instance("generate_until", {}, (prompt, {**free, "until": ["<|other|>"]}), 0)]
    assert len(lm.generate_until(stopped)[0]) < len(lm.generate_until(going_on)[0])
