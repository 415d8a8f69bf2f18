"""How early heldout_cloze tells checkpoints apart: scores of several models on one data folder.

    python benchmarks/cloze.py --data DIR MODEL [MODEL ...] [--hellaswag N]

Prints a Markdown table with a row per model. The first two rows are baselines without knowledge: unigram frequencies,
which score a continuation the same after every context, and the first model's shape untrained. With --hellaswag N the
last column is acc_norm on HellaSwag's first N documents, from the Hub, its cache, or the folder --data-dir.
"""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # hides lm-eval's progress bars; tqdm reads it at import

import numpy as np
import torch
from common import make_parser

from lightlm.checkpoint import LoadedModel
from lightlm.convert.load import load_pretrained
from lightlm.data.folder import DataFolder, resolve_dataset
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results.rows import rows
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.model.transformer import Transformer

METRICS = ["acc", "acc_norm", "acc_mutual_info"]


class Unigrams(LightLM):
    """A model that scores by the training tokens' frequencies and ignores the context."""

    def __init__(self, loaded: LoadedModel, folder: DataFolder) -> None:
        super().__init__(loaded, show_progress=False)
        tokens = folder.split("train").slice(0, min(len(folder.split("train")), 10_000_000))
        counts = np.bincount(tokens, minlength=loaded.tokenizer.vocab_size) + 1
        self._log_probs = np.log(counts / counts.sum())

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [(float(self._log_probs[continuation].sum()), False) for _, _, continuation in requests]


def models(references: list[str], folder: DataFolder) -> Iterator[tuple[str, LightLM]]:
    cpu = torch.device("cpu")
    first = load_pretrained(references[0], cpu, torch.float32)
    if first.tokenizer.sha256 == folder.tokenizer.sha256:
        yield "unigrams", Unigrams(first, folder)
    torch.manual_seed(0)
    yield "untrained", LightLM(LoadedModel(Transformer(first.model.config), first.tokenizer, first.path))
    for reference in references:
        loaded = load_pretrained(reference, cpu, torch.float32)
        yield loaded.name, LightLM(loaded)


def cells(lm: LightLM, tasks: Tasks, metrics: list[str]) -> list[str]:
    found = {row.metric: f"{row.value:.3f} ± {row.stderr:.3f}" for row in rows(run_tasks(lm, tasks).results)}
    return [found[metric] for metric in metrics]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--hellaswag", type=int, default=0, metavar="N")
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    folder = DataFolder.open(resolve_dataset(options.data))
    cloze = Tasks(Settings(["heldout_cloze"], options.limit, data=options.data))
    hellaswag = None
    if options.hellaswag:
        hellaswag = Tasks(Settings(["hellaswag"], options.hellaswag, data_dir=options.data_dir))
    columns = ["model", *METRICS, *([f"HellaSwag acc_norm, {options.hellaswag}"] if hellaswag else [])]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, lm in models(options.models, folder):
        line = [name, *cells(lm, cloze, METRICS), *(cells(lm, hellaswag, ["acc_norm"]) if hellaswag else [])]
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
