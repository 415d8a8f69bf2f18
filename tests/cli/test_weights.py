"""`--weights ema|raw` and `convert --average` on a run with two sets of weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightlm import files
from lightlm.checkpoint import load_model, write_checkpoint
from lightlm.data.tokenizer import train_tokenizer
from lightlm.model.transformer import Transformer
from tests.shapes import SHAPES


def random_model(vocab_size, seed):
    torch.manual_seed(seed)
    model = Transformer(replace(SHAPES["moe"], vocab_size=vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with `averaged`, of three checkpoints with an average and last weights, and `plain`, of two without."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["The cat sat on the mat; the dog did not."] * 3, 300)
    for step in (10, 20, 30):
        average, raw = (random_model(tokenizer.vocab_size, seed) for seed in (step, step + 1))
        arguments = average.state_dict(), average.config, tokenizer
        write_checkpoint(Path("runs/averaged"), step, *arguments, raw=raw.state_dict())
        if step > 10:
            write_checkpoint(Path("runs/plain"), step, *arguments)
    for name in ("averaged", "plain"):
        Path(f"runs/{name}/recipe.yaml").touch()
    files.point_to(Path("runs/latest"), "averaged")
    return tokenizer.vocab_size


def weights_of(vocab_size, *seeds):
    """The mean of random models, in float64."""
    states = [random_model(vocab_size, seed).state_dict() for seed in seeds]
    return {name: sum(state[name].double() for state in states) / len(seeds) for name in states[0]}


def assert_converted(folder, expected):
    state = load_model(Path(folder)).model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "seeds", "folder"),
    [
        (("--weights", "raw"), [31], "lightlm-raw"),
        (("--weights", "ema"), [30], "lightlm-ema"),
        (("--average", "2"), [20, 30], "lightlm-average2"),
        (("--average", "3", "--weights", "raw"), [11, 21, 31], "lightlm-average3-raw"),
    ],
)
def test_convert_writes_the_weights_asked_for(lightlm, run, arguments, seeds, folder):
    done = lightlm("convert", "averaged", *arguments, "--to", "lightlm", "--verify", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(Path("runs/averaged") / folder)
    assert_converted(f"runs/averaged/{folder}", weights_of(run, *seeds))


def test_the_checkpoints_up_to_a_named_one_are_averaged(lightlm, run):
    assert lightlm("convert", "runs/averaged/checkpoints/step_000020", "--average", "2", "--to", "lightlm").code == 0
    assert_converted("runs/averaged/lightlm-step_000020-average2", weights_of(run, 10, 20))
    assert lightlm("convert", "plain", "--average", "2", "--out", "out", "--to", "lightlm").code == 0
    assert_converted("out", weights_of(run, 20, 30))


def test_an_average_exports_to_hugging_face(lightlm, run):
    done = lightlm("convert", "--average", "3", "--out", "hf")
    assert done.code == 0, done.stderr
    from lightlm.convert.load import load_pretrained

    state = load_pretrained("hf").model.state_dict()
    for name, tensor in weights_of(run, 10, 20, 30).items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-6, atol=1e-8)


def test_generate_reads_the_weights_asked_for(lightlm, run):
    texts = {}
    for choice in ((), ("--weights", "ema"), ("--weights", "raw")):
        done = lightlm("generate", "The cat", *choice, "--temperature", "0", "--max-new-tokens", "12", "--json")
        assert done.code == 0, done.stderr
        texts[choice[-1:]] = json.loads(done.stdout)["samples"][0]["text"]
    assert texts[()] == texts[("ema",)] != texts[("raw",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "plain", "--weights", "ema"), "plain/checkpoints/step_000030 holds one set of weights"),
        (("convert", "plain", "--weights", "raw"), "only checkpoints of a run with train.ema hold two"),
        (
            ("convert", "plain", "--average", "3"),
            "has 2 of 3 checkpoints to average up to step_000030: step_000020, step_000030",
        ),
        (("convert", "averaged", "--weights", "last"), "--weights last: use ema or raw"),
        (("convert", "hf", "--average", "2"), "--average and --weights are for a run of LightLM"),
        (("convert", "alone", "--average", "2"), "is not a checkpoint of a run"),
        (("generate", "The", "--checkpoint", "hf", "--weights", "raw"), "hf holds one set of weights"),
        (("generate", "The", "--weights", "both"), "--weights both: use ema or raw"),
        (("eval", "plain", "--weights", "raw"), "holds one set of weights"),
        (("eval", "plain", "--weights", "mean"), "--weights mean: use ema or raw"),
    ],
)
def test_impossible_choices_are_refused(lightlm, run, arguments, message):
    if "hf" in arguments:
        assert lightlm("convert", "plain", "--out", "hf").code == 0
    if "alone" in arguments:
        assert lightlm("convert", "averaged", "--weights", "ema", "--to", "lightlm", "--out", "alone").code == 0
    lightlm(*arguments).assert_one_message(message)


def test_the_card_has_only_scores_of_the_weights_that_are_exported(lightlm, run):
    folder = Path("runs/averaged/eval")
    folder.mkdir()
    for file, task in (("model.safetensors", "piqa"), ("raw.safetensors", "winogrande")):
        path = folder / f"step_000030_{task}.json"
        path.write_text(json.dumps({"results": {task: {"acc,none": 0.5}}}))
        path.with_suffix(".meta.json").write_text(json.dumps({"weights": {file: "0"}}))
    cards = {}
    for name, choice in (("ema", ()), ("raw", ("--weights", "raw")), ("mean", ("--average", "2"))):
        assert lightlm("convert", "averaged", *choice, "--out", name).code == 0
        cards[name] = (Path(name) / "README.md").read_text()
    assert {name: [task in card for task in ("piqa", "winogrande")] for name, card in cards.items()} == {
        "ema": [True, False],
        "raw": [False, True],
        "mean": [False, False],
    }
    assert "Exported from `runs/averaged/checkpoints/step_000030`" in cards["ema"]
    assert (
        "Exported from the last weights, not their average, of `runs/averaged/checkpoints/step_000030`" in cards["raw"]
    )
    assert (
        "the mean of `runs/averaged/checkpoints/step_000020`, `runs/averaged/checkpoints/step_000030`" in cards["mean"]
    )
