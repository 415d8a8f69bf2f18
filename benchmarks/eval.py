"""LightLM's scores and speed beside those of lm-eval's own `hf` model: the same weights, precision and tasks, in turn.

    python benchmarks/eval.py --data-dir ../shared/data/evals --tokenizer ../shared/data/tokenizers/gpt2/tokenizer.json
    python benchmarks/eval.py --model smollm2 runs/demo --tasks hellaswag,arc_easy,piqa --limit 1000 --repeats 1 \\
        --data-dir ../shared/data/evals

Prints documents per second, the largest difference between two answers to the same request, and each task's metrics
with the number of documents on which any metric differs. A model is a Hugging Face folder, a run or checkpoint of
LightLM (exported first), or `gpt2-shape`: GPT-2 124M with random weights. Times cover lm-eval's requests, tokenization
included; loading and making the requests do not count. Both models of a precision are loaded at once and score in turn,
so a busy moment of the machine slows both. Speeds are medians over repeats, with the slowest and the fastest.
"""

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it at import

import torch
from common import make_parser, write_json
from measure import machine_facts, seconds_of

from lightlm.checkpoint import LoadedModel
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.convert.load import load_pretrained
from lightlm.data.sources.hub.client import download_tokenizer
from lightlm.data.tokenizer import load_tokenizer
from lightlm.device import pick_device
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe

METRICS = ("acc", "acc_norm", "word_perplexity", "bits_per_byte", "exact_match")


@dataclass
class Outcome:
    """One model's results on all tasks, with the seconds of each repeat."""

    seconds: list[float] = field(default_factory=list)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        return sum(map(len, self.samples.values()))


def main() -> None:
    options = arguments()
    if options.data_dir:
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    models = [name if name == "gpt2-shape" else locate(name) for name in options.model]
    tokenizer = str(Path(options.tokenizer).resolve()) if Path(options.tokenizer).exists() else options.tokenizer
    out = options.out.resolve() if options.out else None
    report: dict[str, Any] = facts(options)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [hugging_face_folder(model, Path(scratch), tokenizer) for model in models]
        os.chdir(options.data_dir or ".")  # a folder with the name of a data set replaces the Hub's
        for model, folder in zip(options.model, folders, strict=True):
            for dtype in options.dtypes.split(","):
                outcomes = compete(folder, dtype, options)
                entry = {"model": model, "dtype": dtype, **compare(outcomes)}
                show(entry)
                report["models"].append(entry)
                write_json(report, out)


def arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["gpt2-shape"])
    parser.add_argument("--tasks", default="hellaswag")
    parser.add_argument("--limit", type=int, default=200, help="documents per task; 0 is all")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument(
        "--data-dir", type=Path, help="data sets in the Hub's layout; by default lm-eval downloads them"
    )
    parser.add_argument(
        "--tokenizer", default="gpt2", help="tokenizer of gpt2-shape: a file, or a Hub name to download"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch-size", default="16", help="batch size of hf; several make several contestants: 16,64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def locate(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def facts(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "tasks": options.tasks,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "repeats": options.repeats,
        **machine_facts(pick_device(options.device), "transformers", "lm_eval"),
        "models": [],
    }


def hugging_face_folder(model: str, scratch: Path, tokenizer: str) -> Path:
    """Return a folder with the model's weights in fp32, which both contestants load."""
    if model == "gpt2-shape":
        torch.manual_seed(0)
        built = Transformer(load_recipe("gpt2-124m").model)
        loaded = LoadedModel(built, load_tokenizer(tokenizer, download_tokenizer), Path(model))
    elif (Path(model) / "config.json").exists() and (Path(model) / "tokenizer_config.json").exists():
        return Path(model)
    else:
        loaded = load_pretrained(model)
    folder = scratch / loaded.name.replace("/", "_")
    export_huggingface(loaded, folder)
    return folder


def compete(folder: Path, dtype: str, options: argparse.Namespace) -> dict[str, Outcome]:
    from lm_eval.models.huggingface import HFLM

    from lightlm.evaluate.harness import LightLM
    from lightlm.evaluate.settings import Settings
    from lightlm.evaluate.tasks.manager import Tasks
    from lightlm.evaluate.tasks.patches import quiet

    device = pick_device(options.device)
    with quiet():
        tasks = Tasks(Settings(options.tasks.split(",")))
        models: dict[str, Any] = {"lightlm": LightLM(str(folder), str(device), dtype, show_progress=False)}
        for size in options.batch_size.split(","):
            models[f"hf {size}"] = HFLM(str(folder), dtype=dtype, device=str(device), batch_size=int(size))
    outcomes = {name: Outcome() for name in models}
    for repeat in range(options.repeats + 1):
        for name, lm in models.items():
            # The first round warms up: it compiles kernels and faults in memory.
            evaluate(lm, tasks, options, outcomes[name] if repeat else Outcome(), options.limit if repeat else 4)
    return outcomes


def evaluate(lm: Any, tasks: Any, options: argparse.Namespace, outcome: Outcome, limit: int) -> None:
    from lm_eval.evaluator import simple_evaluate

    from lightlm.evaluate.tasks.patches import quiet

    with quiet(), timed(lm) as seconds:
        document = simple_evaluate(
            model=lm,
            tasks=tasks.names,
            task_manager=tasks,
            limit=limit or None,
            num_fewshot=options.num_fewshot,
            bootstrap_iters=0,
        )
    assert document is not None
    outcome.seconds.append(sum(seconds))
    outcome.samples = document["samples"]
    for task, values in document["results"].items():
        named = ((key.partition(",")[0], value) for key, value in values.items())
        outcome.results[task] = {name: value for name, value in named if name in METRICS}


@contextmanager
def timed(lm: Any) -> Iterator[list[float]]:
    """Collect the seconds of each of lm-eval's calls for answers."""
    seconds: list[float] = []
    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")

    def wrap(kind: str) -> Any:
        answer = getattr(lm, kind)

        def run(*args: Any, **kwargs: Any) -> Any:
            answers: list[Any] = []
            seconds.append(seconds_of(lambda: answers.extend(answer(*args, disable_tqdm=True, **kwargs))))
            return answers

        return run

    for kind in kinds:
        setattr(lm, kind, wrap(kind))
    try:
        yield seconds
    finally:
        for kind in kinds:
            delattr(lm, kind)


def compare(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    ours, *others = outcomes.items()
    speeds = {name: [outcome.documents / second for second in outcome.seconds] for name, outcome in outcomes.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    entry: dict[str, Any] = {
        "documents": ours[1].documents,
        "documents_per_second": {
            name: {"median": round(medians[name], 2), "slowest": round(min(v), 2), "fastest": round(max(v), 2)}
            for name, v in speeds.items()
        },
        "ratio": {name: round(medians["lightlm"] / medians[name], 2) for name, _ in others},
        "differences": {},
        "tasks": {},
    }
    for name, other in others:
        pairs = [
            (mine, theirs)
            for task in other.samples
            for mine, theirs in zip(answers(ours[1].samples[task]), answers(other.samples[task]), strict=True)
        ]
        entry["differences"][name] = {
            "requests": len(pairs),
            "largest": max((abs(mine[0] - theirs[0]) for mine, theirs in pairs), default=0.0),
            "argmax": sum(mine[1] != theirs[1] for mine, theirs in pairs),
        }
    for task in ours[1].samples:
        entry["tasks"][task] = {
            "documents": len(ours[1].samples[task]),
            **{name: outcome.results[task] for name, outcome in outcomes.items()},
            "differing": {name: differing(ours[1].samples[task], other.samples[task]) for name, other in others},
        }
    return entry


def answers(samples: list[dict[str, Any]]) -> Iterator[tuple[float, bool]]:
    """Yield log-likelihood and greediness of each request, in the order of documents."""
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for answer in sample["filtered_resps"]:
            if isinstance(answer, tuple | list):
                yield float(answer[0]), bool(answer[1])
            elif isinstance(answer, float):
                yield answer, True


def differing(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    """Count the documents on which any metric differs."""
    by_id = {sample["doc_id"]: sample for sample in theirs}
    return sum(any(sample[key] != by_id[sample["doc_id"]][key] for key in METRICS if key in sample) for sample in ours)


def show(entry: dict[str, Any]) -> None:
    print(f"\n{entry['model']}, {entry['dtype']}, {entry['documents']:,} documents")
    for name, speed in entry["documents_per_second"].items():
        ratio = f"  lightlm is {entry['ratio'][name]:.2f} times as fast" if name in entry["ratio"] else ""
        print(
            f"  {name:8} {speed['median']:8.2f} documents/s ({speed['slowest']:.2f} to {speed['fastest']:.2f}){ratio}"
        )
    for name, found in entry["differences"].items():
        print(
            f"  to {name}: largest difference {found['largest']:.2e} nats, argmax differs in {found['argmax']} "
            f"of {found['requests']:,} requests"
        )
    for task, row in entry["tasks"].items():
        figures = "; ".join(
            f"{name} " + ", ".join(f"{metric} {value:.4f}" for metric, value in row[name].items())
            for name in entry["documents_per_second"]
        )
        print(f"  {task} ({row['documents']:,}): {figures}; differing documents {row['differing']}")


if __name__ == "__main__":
    main()
