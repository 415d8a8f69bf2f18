"""The best model of an hour on this machine, with nanoGPT's hour beside it: the same shards, tokenizer and scores.

    lightlm prepare-data CORPUS --tokenizer train:8192 --out data/speedrun
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/speedrun.py --work WORK --data data/speedrun --nanogpt nanoGPT --minutes 60
    python benchmarks/speedrun.py --work TRIAL --data data/speedrun --nanogpt nanoGPT --minutes 1 --tasks heldout

The contestants train in turn, each with all cores. LightLM trains recipes/speedrun.yaml with --max-minutes, so its
start, evaluations and checkpoints are within the limit. nanoGPT trains GPT-2 with its own, unchanged train.py: a few
steps are timed first, and then it gets as many as fill the limit, its evaluations and compilation not counted. On a
CPU nanoGPT computes in float32: its code has no other precision there. Its settings are NANOGPT; --set key=value
changes one.

Its checkpoint becomes a GPT-2 folder of Hugging Face, which LightLM reads. nanoGPT's GELU is exact and GPT-2's is the
tanh approximation; the result holds the loss of both. Then `lightlm eval` scores both models and
`lightlm generate` lets both write. Each step leaves a file in WORK, so the same command resumes.
Prints a table; results and texts go to --out as JSON, and texts to WORK/texts.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, write_json

HERE = Path(__file__).resolve().parent
RUN = "speedrun"
# GPT-2 about as large as the recipe, with the batch, warmup and beta2 that `learning.py gpt2` found. Its rate is a step
# below the best there, 5.6e-3, because an hour has ten times the tokens. nanoGPT's code fixes the initial weights.
NANOGPT: dict[str, Any] = {
    "n_layer": 6,
    "n_head": 4,
    "n_embd": 192,
    "block_size": 256,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 4e-3,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "dropout": 0.0,
    "bias": True,
    "compile": True,
}
WARMUP, FINAL_RATE = 0.1, 0.1  # of the iterations, of the rate
PROBED, SETTLED = 30, 10  # iterations that are timed, and those before that do not count
SAVES = 6  # checkpoints of nanoGPT, each after an evaluation
LARGEST_DIFFERENCE = 0.01  # nats per token between nanoGPT's model and its export, whose GELU is an approximation
EVALUATED = 20  # batches per evaluation of nanoGPT
PROMPTS = ("The history of", "The cell is", "She opened the door and")
METRICS = (  # of `lightlm eval`: task, metric, heading
    ("heldout", "bits_per_byte", "bits per byte"),
    ("heldout_cloze", "acc", "cloze acc"),
    ("heldout_cloze", "acc_mutual_info", "cloze acc_mutual_info"),
    ("arc_easy", "acc_norm", "ARC-Easy acc_norm"),
    ("piqa", "acc_norm", "PIQA acc_norm"),
)


@dataclass(frozen=True)
class Trained:
    """A contestant after its training.

    Attributes:
        model: what `lightlm eval` and `lightlm generate` read.
        seconds: of training steps; nanoGPT's and LightLM's own clocks.
    """

    model: str
    tokens: int
    seconds: float
    facts: dict[str, Any]


def run_lightlm(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of this checkout's LightLM; its messages go to the terminal."""
    command = [sys.executable, "-m", "lightlm", *arguments]
    done = subprocess.run(command, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"lightlm {arguments[0]} failed ({done.returncode}); the same command resumes")
    return done


def train_lightlm(options: argparse.Namespace) -> Trained:
    """Train the recipe for as long as the limit allows, or resume."""
    runs = options.work / "runs"
    arguments = ["train", options.recipe, f"data.dataset={options.data}", *options.overrides]
    arguments += ["--runs-dir", str(runs), "--name", RUN, "--auto-resume", "--max-minutes", f"{options.minutes:g}"]
    run_lightlm([*arguments, "--no-report"])
    from lightlm.machine import read_machine
    from lightlm.report.record import read_records

    summary = read_records([runs / RUN])[0].summary()
    facts = {key: summary[key] for key in ("parameters", "flops_per_token", "val_loss", "val_bpb", "device")}
    facts["dtype"] = read_machine(runs / RUN)["dtype"]
    return Trained(str(runs / RUN), summary["tokens"], 3600 * summary["hours"], facts)


def write_nanogpt_data(data: Path, out: Path) -> int:
    """Write the tokens of a prepared folder as nanoGPT's train.bin, val.bin and meta.pkl; return the vocabulary's size.

    nanoGPT reads uint16 tokens without a header.
    """
    import pickle

    from lightlm.data.folder import DataFolder

    folder = DataFolder.open(data)
    vocabulary = folder.tokenizer.vocab_size
    if vocabulary > 2**16:
        raise SystemExit(f"{data}: nanoGPT stores tokens in 16 bits, and this vocabulary has {vocabulary:,} entries")
    out.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train.bin"), ("val", "val.bin")):
        stream = folder.split(split)
        with (out / name).open("wb") as file:
            for start in range(0, len(stream), 1 << 24):
                stream.slice(start, min(1 << 24, len(stream) - start)).astype("<u2").tofile(file)
    (out / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))  # last: it says that all is there
    return vocabulary


def train_nanogpt(options: argparse.Namespace) -> Trained:
    """Train nanoGPT for the limit, or resume; write its model as a GPT-2 folder."""
    from lightlm.machine import git_commit

    place = options.work / "nanogpt"
    data, checkpoint, log = place / "data", place / "ckpt.pt", place / "train.log"
    if not (data / "meta.pkl").is_file():
        write_nanogpt_data(options.data, data)
    settings = NANOGPT | options.set | {"dataset": str(data), "device": "cpu", "dtype": "float32", "log_interval": 1}
    plan_file = place / "plan.json"
    if not plan_file.is_file():
        probe = {"out_dir": str(place / "probe"), "max_iters": PROBED, "eval_interval": 10**9, "eval_iters": 1}
        run_nanogpt(options.nanogpt, settings | probe, place / "probe.log")
        step = statistics.median(iteration_seconds(place / "probe.log")[SETTLED:])
        write_json({"seconds_per_iteration": step} | plan_nanogpt(options.minutes, step), plan_file)
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    iterations = plan["max_iters"]
    settings |= {"out_dir": str(place), "eval_iters": EVALUATED, "lr_decay_iters": iterations} | plan
    settings |= {"min_lr": FINAL_RATE * settings["learning_rate"], "warmup_iters": int(WARMUP * iterations)}
    settings.pop("seconds_per_iteration")
    if not checkpoint.is_file() or load_nanogpt(checkpoint)["iter_num"] < iterations:
        start = {"init_from": "resume"} if checkpoint.is_file() else {}
        run_nanogpt(options.nanogpt, settings | start, log)
    hf = place / "hf"
    difference = export_nanogpt(checkpoint, options, hf)
    tokens = iterations * settings["batch_size"] * settings["block_size"] * settings["gradient_accumulation_steps"]
    seconds = sum(iteration_seconds(log)[:iterations])
    facts = {"settings": settings, "commit": git_commit(options.nanogpt), **difference}
    return Trained(str(hf), tokens, seconds, facts)


def plan_nanogpt(minutes: float, seconds: float) -> dict[str, int]:
    """Return the iterations that fill the limit, as a multiple of the interval between checkpoints.

    nanoGPT saves only when it evaluates, so the last iteration must be one with an evaluation.
    """
    interval = max(1, int(60 * minutes / seconds) // SAVES)
    return {"max_iters": SAVES * interval, "eval_interval": interval}


def run_nanogpt(code: Path, settings: dict[str, Any], log: Path) -> None:
    """Run nanoGPT's train.py in its folder; append its output to a log."""
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=code, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"nanoGPT failed ({done.returncode}): see {log}; the same command resumes")


def iteration_seconds(log: Path) -> list[float]:
    """Return the seconds of each iteration in nanoGPT's log; of one that a resumed run repeated, the last.

    nanoGPT counts an evaluation with the iteration that follows it, so such iterations count as the median of all.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^(?:step (\d+): train|iter (\d+): loss \S+, time ([\d.]+)ms)", text, flags=re.MULTILINE)
    evaluated = {int(step) for step, _, _ in found if step}
    times = {int(number): float(time) / 1000 for _, number, time in found if number}
    median = statistics.median(times.values())
    return [median if number in evaluated else times[number] for number in sorted(times)]


def load_nanogpt(checkpoint: Path) -> dict[str, Any]:
    """Return nanoGPT's checkpoint."""
    import torch

    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def export_nanogpt(checkpoint: Path, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Write nanoGPT's model as a Hugging Face folder; return its parameters, and the losses of both on some text.

    Raises:
        SystemExit: the losses differ by more than the two GELUs explain.
    """
    import torch
    import transformers

    from lightlm.data.folder import DataFolder

    saved = load_nanogpt(checkpoint)
    shape = saved["model_args"]
    weights = {key.removeprefix("_orig_mod."): value for key, value in saved["model"].items()}
    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights:  # nanoGPT without biases
                parameter.zero_()
                continue
            # GPT2LMHeadModel stores its linear layers as inputs x outputs, nanoGPT as outputs x inputs.
            linear = parameter.ndim == 2 and ".h." in name
            parameter.copy_(weights[name].T if linear else weights[name])
    folder = DataFolder.open(options.data)
    losses = _losses(weights, shape, options.nanogpt, model, folder)
    if abs(losses["loss"] - losses["loss_exported"]) > LARGEST_DIFFERENCE:
        raise SystemExit(f"nanoGPT's model has another loss in its own code than after the export: {losses}")
    out.mkdir(exist_ok=True)
    model.save_pretrained(out)
    folder.tokenizer.save(out / "tokenizer.json")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), **losses}


def _losses(weights: dict[str, Any], shape: dict[str, Any], code: Path, model: Any, folder: Any) -> dict[str, float]:
    """Return the loss of nanoGPT's own model and of the exported one on the first validation tokens."""
    import torch

    stream, length = folder.split("val"), shape["block_size"]
    rows = max(1, min(32, (len(stream) - 1) // length))
    tokens = torch.from_numpy(stream.slice(0, min(rows * length, len(stream))).astype(np.int64))
    tokens_BT = tokens.view(rows, -1)
    spec = importlib.util.spec_from_file_location("nanogpt_model", code / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{code}/model.py cannot be imported")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**shape)).eval()
    theirs.load_state_dict(weights)
    with torch.no_grad():
        own = theirs(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous())[1]
        return {"loss": float(own), "loss_exported": float(model(tokens_BT, labels=tokens_BT).loss)}


def score(name: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of `lightlm eval` by task."""
    out = options.work / f"scores-{name}.json"
    if not out.is_file():
        arguments = ["eval", model, "--tasks", options.tasks, "--data", str(options.heldout or options.data)]
        arguments += ["--data-dir", str(options.data_dir)] if options.data_dir else []
        arguments += ["--limit", str(options.limit)] if options.limit else []
        run_lightlm([*arguments, "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8"))["results"]


def write_texts(name: str, model: str, options: argparse.Namespace) -> dict[str, str]:
    """Return how a model continues PROMPTS, with one seed, and keep it as text."""
    out = options.work / "texts" / f"{name}.json"
    if not out.is_file():
        out.parent.mkdir(exist_ok=True)
        texts = {}
        for prompt in PROMPTS:
            arguments = ["generate", prompt, "--checkpoint", model, "--max-new-tokens", "120", "--json"]
            texts[prompt] = json.loads(run_lightlm(arguments, stdout=subprocess.PIPE).stdout)["samples"][0]["text"]
        write_json(texts, out)
    return json.loads(out.read_text(encoding="utf-8"))


def table(contestants: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of the contestants: size, tokens, time and scores."""
    known = [each for each in METRICS if any(each[0] in entry["scores"] for entry in contestants.values())]
    heads = ["", "parameters", "tokens", "minutes", *(heading for _, _, heading in known)]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, entry in contestants.items():
        cells = [name, f"{entry['facts']['parameters']:,}", f"{entry['tokens']:,}", f"{entry['seconds'] / 60:.1f}"]
        cells += [_score(entry["scores"].get(task, {}), metric) for task, metric, _ in known]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _score(result: dict[str, Any], metric: str) -> str:
    value, error = result.get(f"{metric},none"), result.get(f"{metric}_stderr,none")
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) and math.isfinite(error) else "")


CONTESTANTS = {"lightlm": train_lightlm, "nanogpt": train_nanogpt}


def train(name: str, options: argparse.Namespace) -> Trained:
    """Train a contestant, or return what an earlier call has trained."""
    done = options.work / f"trained-{name}.json"
    if not done.is_file():
        write_json(asdict(CONTESTANTS[name](options)), done)
    return Trained(**json.loads(done.read_text(encoding="utf-8")))


def parse_setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    if key not in NANOGPT:
        raise argparse.ArgumentTypeError(f"{key}: choose from {', '.join(NANOGPT)}")
    try:
        return key, type(NANOGPT[key])(json.loads(value.lower()))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write {key}={NANOGPT[key]}") from None


def check_work(options: argparse.Namespace) -> None:
    """Keep what a folder was started with, and where; refuse to resume it with something else or elsewhere."""
    from lightlm.machine import cpu_features, processor

    options.work.mkdir(parents=True, exist_ok=True)
    asked = {key: str(getattr(options, key)) for key in ("minutes", "data", "recipe", "overrides", "set")}
    asked |= {key: str(getattr(options, key)) for key in ("tasks", "limit", "heldout")}
    asked["machine"] = f"{processor()}, {os.cpu_count()} cores, {cpu_features()}"
    kept = options.work / "settings.json"
    if not kept.is_file():
        write_json(asked, kept)
    before = json.loads(kept.read_text(encoding="utf-8"))
    if changed := [f"{key} {before.get(key)}" for key in asked if before.get(key) != asked[key]]:
        raise SystemExit(f"{options.work} was started with {', '.join(changed)}; give another --work")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs, outside the repository")
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder")
    parser.add_argument("--heldout", type=Path, help="prepared folder whose validation split is scored; default --data")
    parser.add_argument("--recipe", default=str(HERE.parent / "recipes" / "speedrun.yaml"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--set", type=parse_setting, action="append", default=[], metavar="key=value")
    parser.add_argument("--only", choices=list(CONTESTANTS), help="one contestant")
    parser.add_argument("--tasks", default="heldout,arc_easy,piqa")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--data-dir", type=Path, help="data sets in the Hub's layout, instead of the Hub")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_intermixed_args()
    options.set = dict(options.set)
    for key in ("work", "data", "heldout", "nanogpt", "data_dir"):
        if (path := getattr(options, key)) is not None:
            setattr(options, key, path.resolve())
    names = [options.only] if options.only else list(CONTESTANTS)
    if "nanogpt" in names and not (options.nanogpt and (options.nanogpt / "train.py").is_file()):
        parser.error("nanoGPT's code is needed: clone it and give --nanogpt FOLDER, or --only lightlm")
    check_work(options)
    from measure import machine_facts

    contestants = {}
    for name in names:
        trained = train(name, options)
        found = asdict(trained) | {"scores": score(name, trained.model, options)}
        contestants[name] = found | {"texts": write_texts(name, trained.model, options)}
    print(table(contestants))
    result = {"minutes": options.minutes, "machine": machine_facts(None, "transformers", "lm_eval")}
    write_json(result | {"contestants": contestants}, options.out)


if __name__ == "__main__":
    main()
