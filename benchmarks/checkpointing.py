"""What saving a checkpoint costs training, written in the foreground and in the background.

    python benchmarks/checkpointing.py                                    # the demo's shape
    python benchmarks/checkpointing.py --recipe lightlm --sequences 2 --length 1024

`stall` is how long a step waits for its save to begin or, in the foreground, to end; the first one in the background
also allocates the copy. `seconds` is from there until the checkpoint is complete on the disk. A step here is one
micro-batch and the optimizer; the recipe's own step has more micro-batches, and the stall is given as a share of both.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightlm import __version__
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.device import autocast, describe, pick_device, pick_dtype
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.optim.state import named_state
from lightlm.recipe import CheckpointSection, Recipe, load_recipe
from lightlm.train.checkpointing.saving import Saver
from lightlm.train.step.loss import token_loss


class Watch:
    """Counts completed saves."""

    def __init__(self) -> None:
        self.complete = 0

    def checkpoint(self, path: Path) -> None:
        self.complete += 1

    def note(self, message: str) -> None:
        print(message)


class Workload:
    """A model in training on random tokens."""

    def __init__(self, recipe: Recipe, sequences: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        vocab_size = recipe.model.vocab_size or (8192 if recipe.name == "demo" else 50_257)
        config = replace(recipe.model, vocab_size=vocab_size, max_seq_len=max(length, recipe.model.max_seq_len))
        torch.manual_seed(0)
        self.model = Transformer(config).to(device).train()
        self.optimizer = build_optimizer(self.model, recipe.optimizer, dtype)
        self.tokens = torch.randint(vocab_size, (sequences, length + 1), device=device)

    def micro_batch(self) -> None:
        with autocast(self.device, self.dtype):
            loss = token_loss(self.model, self.tokens[:, :-1], self.tokens[:, 1:].contiguous())
        (loss / self.tokens.numel()).backward()
        loss.item()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        return timed(self.micro_batch) + timed(self.update)

    def save(self, saver: Saver, step: int) -> None:
        saver.save(step, self.model.state_dict(), {"optimizer": named_state(self.model, self.optimizer)})


def timed(function: Any) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(work: Workload, tokenizer: Tokenizer, saves: int, *, asynchronous: bool, folder: Path) -> dict[str, Any]:
    """Save `saves` times with steps in between, and during."""
    stalls, totals, during = [], [], []
    settings, watch = CheckpointSection(asynchronous=asynchronous, keep_last=1), Watch()
    with Saver(folder, settings, tokenizer, work.model.config, watch) as saver:
        for number in range(1, saves + 1):
            started = time.time()
            stalls.append(timed(lambda number=number: work.save(saver, number)))
            while watch.complete < number:
                during.append(work.step())
                saver.report()
            totals.append((folder / "checkpoints" / "latest").lstat().st_ctime - started)
            work.step()
    result = {"first_stall": stalls[0], "stall": statistics.median(stalls[1:]), "seconds": statistics.median(totals)}
    # The last of these steps ends after the writer does.
    return result | ({"step_during_save": statistics.median(during)} if during else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("."), help="the disk to write to")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe, device = load_recipe(options.recipe), pick_device(options.device)
    dtype = pick_dtype("auto", device)
    work = Workload(recipe, options.sequences, options.length, device, dtype)
    tokenizer = train_tokenizer(["a tokenizer is a small part of a checkpoint"], 300)
    steps = [(timed(work.micro_batch), timed(work.update)) for _ in range(6)][2:]
    micro, update = (statistics.median(seconds) for seconds in zip(*steps, strict=True))
    own_step = recipe.train.batch_tokens / (options.sequences * options.length) * micro + update
    result: dict[str, Any] = {
        "recipe": options.recipe,
        "parameters": work.model.num_parameters()["total"],
        "batch": f"{options.sequences} x {options.length}",
        "device": describe(device),
        "machine": platform.platform(),
        "versions": {"lightlm": __version__, "torch": torch.__version__},
        "step": micro + update,
        "recipe_step": own_step,
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, asynchronous in (("synchronous", False), ("asynchronous", True)):
            figures = measure(work, tokenizer, options.saves, asynchronous=asynchronous, folder=Path(folder) / name)
            shares = {
                "share_of_step": figures["stall"] / (micro + update),
                "share_of_recipe_step": figures["stall"] / own_step,
            }
            result[name] = figures | shares
    print(text := json.dumps(result, indent=2, default=float))
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
