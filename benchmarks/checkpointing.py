"""Cost of saving a checkpoint during training, written in the foreground and in the background.

    python benchmarks/checkpointing.py                                    # the demo's shape
    python benchmarks/checkpointing.py --recipe lightlm --sequences 2 --length 1024

Prints JSON. `stall` is the time that a step waits for its save: in the foreground until the save ends, in the
background until it begins. `first_stall` also allocates the background's copy. `seconds` is the time until the
checkpoint is complete on disk. A step here is one micro-batch and the optimizer. The recipe's own step has more
micro-batches; the stall is given as a share of both.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import make_parser, report
from measure import load_shape, machine_facts, seconds_of

from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.device import autocast, pick_device, pick_dtype
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.optim.section import OptimizerSection
from lightlm.optim.state import named_state
from lightlm.recipe import CheckpointSection
from lightlm.train.checkpointing.saving import Saver
from lightlm.train.step.loss import token_loss


class Watch:
    """An observer that counts completed saves."""

    def __init__(self) -> None:
        self.complete = 0

    def checkpoint(self, path: Path) -> None:
        self.complete += 1

    def note(self, message: str) -> None:
        print(message)


class Workload:
    """A model in training on random tokens."""

    def __init__(
        self, config: ModelConfig, section: OptimizerSection, batch: tuple[int, int], device: torch.device
    ) -> None:
        self.device, self.dtype = device, pick_dtype("auto", device)
        torch.manual_seed(0)
        self.model = Transformer(config).to(device).train()
        self.optimizer = build_optimizer(self.model, section, self.dtype)
        sequences, length = batch
        self.tokens = torch.randint(config.vocab_size, (sequences, length + 1), device=device)

    def micro_batch(self) -> None:
        with autocast(self.device, self.dtype):
            loss = token_loss(self.model, self.tokens[:, :-1], self.tokens[:, 1:].contiguous())
        (loss / self.tokens.numel()).backward()
        loss.item()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        return seconds_of(self.micro_batch, self.device) + seconds_of(self.update, self.device)

    def save(self, saver: Saver, step: int) -> None:
        saver.save(step, self.model.state_dict(), {"optimizer": named_state(self.model, self.optimizer)})


def measure(work: Workload, tokenizer: Tokenizer, saves: int, *, asynchronous: bool, folder: Path) -> dict[str, Any]:
    """Save `saves` times, with steps between the saves and during them."""
    stalls, totals, during = [], [], []
    settings, watch = CheckpointSection(asynchronous=asynchronous, keep_last=1), Watch()
    with Saver(folder, settings, tokenizer, work.model.config, watch) as saver:
        for number in range(1, saves + 1):
            started = time.time()
            stalls.append(seconds_of(lambda number=number: work.save(saver, number), work.device))
            while watch.complete < number:
                during.append(work.step())
                saver.report()
            totals.append((folder / "checkpoints" / "latest").lstat().st_ctime - started)
            work.step()
    result = {"first_stall": stalls[0], "stall": statistics.median(stalls[1:]), "seconds": statistics.median(totals)}
    # The last step during a save ends after the save does.
    return result | ({"step_during_save": statistics.median(during)} if during else {})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("."), help="the disk to write to")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    recipe, config = load_shape(options.recipe, positions=options.length)
    work = Workload(config, recipe.optimizer, (options.sequences, options.length), device)
    tokenizer = train_tokenizer(["a tokenizer is a small part of a checkpoint"], 300)
    steps = [(seconds_of(work.micro_batch, device), seconds_of(work.update, device)) for _ in range(6)][2:]
    micro, update = (statistics.median(seconds) for seconds in zip(*steps, strict=True))
    own_step = recipe.train.batch_tokens / (options.sequences * options.length) * micro + update
    result: dict[str, Any] = {
        "recipe": options.recipe,
        "parameters": work.model.num_parameters()["total"],
        "batch": f"{options.sequences} x {options.length}",
        **machine_facts(device),
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
    report(result, options.out)


if __name__ == "__main__":
    main()
