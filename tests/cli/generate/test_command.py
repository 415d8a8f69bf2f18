import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lightlm
from lightlm.cli.generate.command import PromptCommand, generate
from lightlm.cli.generate.model import ModelChoice
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.beams import beam_search
from lightlm.generate.sampling import DEFAULT

app = typer.Typer()
app.command(cls=PromptCommand)(generate)


pytestmark = pytest.mark.usefixtures("here")


def run_json(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_text_is_the_prompt_and_its_continuation_and_brackets_are_no_markup() -> None:
    prompt = "[bold]The cat[/bold] sat"
    sample = run_json(prompt, "--max-new-tokens", "8")["samples"][0]
    done = CliRunner().invoke(app, [prompt, "--max-new-tokens", "8"])
    assert done.stdout == prompt + sample["text"] + "\n"
    assert "tokens/s" in done.stderr


def test_the_seed_decides_and_more_samples_leave_the_first_alone() -> None:
    one = run_json("The cat", "--max-new-tokens", "6", "--seed", "5")
    three = run_json("The cat", "--max-new-tokens", "6", "--seed", "5", "--num-samples", "3")
    assert three["samples"][0] == one["samples"][0]
    assert run_json("The cat", "--max-new-tokens", "6", "--seed", "6")["samples"] != one["samples"]
    assert three["sampling"] == json.loads(json.dumps(asdict(DEFAULT)))


def test_every_setting_of_sampling_has_an_option_that_reaches_it() -> None:
    given = {
        "temperature": 1.5,
        "top_k": 30,
        "top_p": 0.8,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "no_repeat_ngram": 2,
        "logit_bias": [[3, 2.5], [4, -100.0]],
        "min_new_tokens": 3,
    }
    assert set(given) == set(asdict(DEFAULT))
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "logit_bias"]
    document = run_json("The cat", "--max-new-tokens=4", "--logit-bias=3=2.5", "--logit-bias=4=-100", *arguments)
    assert document["sampling"] == given


def test_logprobs_are_those_that_the_model_gives_to_the_text() -> None:
    [sample] = run_json("The cat", "--max-new-tokens=5", "--logprobs=2", "--temperature=2")["samples"]
    model = lightlm.load()
    ids = [*model.tokenizer.encode("The cat"), *sample["ids"]]
    expected_TV = model.logits(ids).log_softmax(-1)
    for place, (token, entry) in enumerate(zip(sample["ids"], sample["logprobs"], strict=True)):
        row_V = expected_TV[len(ids) - len(sample["ids"]) + place - 1]
        assert entry["logprob"] == pytest.approx(float(row_V[token]), abs=1e-4)
        assert [top["id"] for top in entry["top_logprobs"]] == row_V.topk(2).indices.tolist()
        raw = model.tokenizer.bytes_of(token)  # parts of characters are told apart
        assert entry["token"].encode() == raw or entry["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@pytest.mark.parametrize("options", [["--lookup"], ["--draft", "demo"], ["--draft", "demo", "--guesses", "2"]])
def test_guesses_leave_the_text_as_it_is(options: list[str]) -> None:
    given = ["The cat sat on the cat sat on", "--max-new-tokens", "16", "--temperature", "2"]
    assert run_json(*given, *options)["samples"] == run_json(*given)["samples"]
    done = CliRunner().invoke(app, [*given, *options])
    assert re.search(r"\d+ of \d+ guesses were right", done.stderr)


def test_beams_are_printed_best_first_with_their_scores() -> None:
    document = run_json("The cat", "--max-new-tokens", "6", "--beams", "4", "--num-samples", "3", "--stop", "a")
    model = lightlm.load()
    tokenizer = model.tokenizer
    ends = tokenizer.end_ids
    found = beam_search(
        model.transformer, tokenizer.encode("The cat"), 4, 6, stop_ids=ends, vocab_size=tokenizer.vocab_size
    )
    assert document["beams"] == {"count": 4, "length_penalty": 1.0}
    for sample, beam in zip(document["samples"], found[:3], strict=True):
        assert (sample["ids"], sample["score"]) == (beam.ids, pytest.approx(beam.score, abs=1e-5))
        assert sample["text"] == tokenizer.decode(beam.ids).partition("a")[0]
    done = CliRunner().invoke(app, ["The cat", "--max-new-tokens", "6", "--beams", "4", "--length-penalty", "0"])
    assert done.stdout.startswith("The cat")


def test_samples_are_printed_one_after_the_other() -> None:
    done = CliRunner().invoke(app, ["The cat", "--max-new-tokens", "5", "--num-samples", "3"])
    samples = run_json("The cat", "--max-new-tokens", "5", "--num-samples", "3")["samples"]
    assert done.stdout == "\n---\n".join(f"The cat{sample['text']}\n" for sample in samples)


def test_an_empty_prompt_starts_a_document() -> None:
    document = run_json("", "--max-new-tokens", "5", "--temperature", "0")
    assert document["samples"][0]["ids"]


@pytest.mark.parametrize("arguments", [["- milk"], ["--checkpoint", "demo", "- milk"], ["--", "- milk"]])
def test_a_prompt_may_begin_with_a_dash(arguments: list[str]) -> None:
    document = run_json("--max-new-tokens", "3", *arguments) if "--" not in arguments else None
    done = CliRunner().invoke(app, ["--max-new-tokens", "3", *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("- milk")
    assert document is None or document["prompt"] == "- milk"


def test_an_unknown_short_option_may_be_a_prompt_and_a_long_one_is_a_mistake() -> None:
    assert 'generate -- "-5"' in str(CliRunner().invoke(app, ["-milk"]).exception)
    assert "No such option: --temprature" in CliRunner().invoke(app, ["x", "--temprature", "1"]).output


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_dash_reads_the_prompt_from_standard_input(ending: str) -> None:
    text = "Grüße\nThe cat"
    done = CliRunner().invoke(app, ["-", "--max-new-tokens", "3", "--json"], input=(text + ending).encode())
    assert json.loads(done.stdout)["prompt"] == text
    bad = CliRunner().invoke(app, ["-"], input=b"caf\xe9")
    assert "standard input is not valid UTF-8 at character 4; convert it" in str(bad.exception)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9")
    for arguments in (["--prompt-file", str(file)], ["--jsonl", str(file), "--out", str(tmp_path / "answers")]):
        text = str(CliRunner().invoke(app, arguments).exception)
        assert str(file) in text
        assert "is not valid UTF-8 at character 4; save" in text


def test_a_missing_draft_is_told_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelChoice, "load", lambda *_: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(app, ["x", "--draft", "nothing"])
    assert isinstance(done.exception, LightLMError)
    assert "nothing" in str(done.exception)


def test_a_full_context_is_told() -> None:
    arguments = ["The cat", "--temperature", "0", "--max-new-tokens", "500"]
    [sample] = run_json(*arguments)["samples"]
    assert sample["finish_reason"] in {"context", "stop"}
    done = CliRunner().invoke(app, arguments)
    assert ("context of 40 tokens" in done.stderr) == (sample["finish_reason"] == "context")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["x", "--temperature", "-1"], UsageError, "temperature"),
        (["x", "--logit-bias", "5:1"], UsageError, "--logit-bias 5:1: write a token id and a number"),
        (["x", "--logit-bias", "99999=1"], UsageError, "token id 99999"),
        (["x", "--min-new-tokens", "300"], UsageError, "min-new-tokens is 300, above max-new-tokens"),
        (["x", "--logprobs", "2"], UsageError, "--json"),
        (["x", "--length-penalty", "2"], UsageError, "add --beams"),
        (["x", "--beams", "2", "--temperature", "1"], UsageError, "leave out --temperature"),
        (["x", "--beams", "2", "--num-samples", "3"], UsageError, "at least as many as --num-samples"),
        (["x", "--lookup", "--draft", "demo"], UsageError, "choose one"),
        (["x", "--lookup", "--num-samples", "2"], UsageError, "one text faster"),
        (["x", "--mtp", "--lookup"], UsageError, "choose one"),
        (["x", "--mtp", "--beams", "2"], UsageError, "one text faster"),
        (["x", "--mtp", "--guesses", "2"], UsageError, "--guesses says how many tokens --lookup or --draft guess"),
        (["x", "--mtp"], LightLMError, "has no heads of multi-token prediction"),
        (["x", "--draft", "nothing"], LightLMError, "nothing"),
        (["caf\udcff"], UsageError, "not valid UTF-8 at character 4"),
        (["x", "--device", "abacus"], UsageError, "abacus"),
        (["The cat ran " * 40], LightLMError, "context holds 40"),
        (["x", "--checkpoint", "runs/nothing"], LightLMError, "nothing"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], kind: type[Exception], words: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, kind)
    assert words in str(done.exception)
    assert done.stdout == ""


def test_no_samples_is_wrong_usage() -> None:
    done = CliRunner().invoke(app, ["x", "--num-samples", "0"])
    assert done.exit_code == 2
    assert "--num-samples" in done.output


def test_weights_rounded_to_int8_give_other_numbers_near_the_exact_ones() -> None:
    arguments = ["The cat", "--max-new-tokens=1", "--logprobs=1", "--temperature=0"]
    [exact], [rounded] = (run_json(*arguments, *more)["samples"] for more in ([], ["--quantize=int8"]))
    [[first], [second]] = exact["logprobs"], rounded["logprobs"]
    assert first["logprob"] != second["logprob"]
    assert first["logprob"] == pytest.approx(second["logprob"], abs=0.05)


@pytest.mark.parametrize("wrong", [["--quantize=int4"], ["--quantize=int8", "--dtype=float32"]])
def test_a_rounding_that_does_not_exist_is_wrong_usage(wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["The cat", *wrong])
    assert isinstance(done.exception, UsageError)
    assert "--quantize" in str(done.exception)
