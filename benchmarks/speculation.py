"""Tokens per second of one text with and without guesses: from the text so far, a draft, or the model's own MTP head.

    python benchmarks/speculation.py SmolLM2-135M-Instruct --out benchmarks/results/speculation-smollm2-cpu.json
    python benchmarks/speculation.py runs/demo --draft runs/draft --out benchmarks/results/speculation-demo-cpu.json
    python benchmarks/speculation.py runs/demo      # of a run with train.mtp.depth=1

In each round the ways take turns on the same text, a repetitive one and a plain one, greedily and at temperature 0.8;
the first round is not counted. Ratios to plain decoding are taken within a round, and printed as the median with the
lowest and the highest. "always" guesses in each step; the others pause while guesses cost more than they make, as
`lightlm generate` does. Reading the prompt is not timed. Ends of the text are banned, so that all texts are as long.

With --draft it also prints how often a draft's draw is the model's on the first tokens of --text, with the defaults of
sampling, and what the rule of Leviathan et al. (arXiv 2211.17192) accepts, the highest share possible. `--rounds 0`
prints nothing else.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import make_parser, write_json
from measure import dtype_name, machine_facts

from lightlm.checkpoint import LoadedModel, has_mtp, is_checkpoint
from lightlm.device import keep_freed_memory, pick_device
from lightlm.generate.batch import Batch, Request, row_generator
from lightlm.generate.load import load_for_decoding
from lightlm.generate.own_draft import own_draft_of
from lightlm.generate.pace import Pace, round_costs
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.sampling.draw import draw
from lightlm.generate.sampling.filters import candidates
from lightlm.generate.speculation import Guesser, Lookup, Speculation, draft_of

TEXTS = {
    "repetitive": (
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
        "    def __add__(self, other):\n        return Point(self.x + other.x, self.y + other.y)\n\n"
        "    def __sub__(self, other):\n"
    ),
    "plain": "The old lighthouse keeper had not spoken to anyone for three weeks when the letter arrived.",
}


_DRAWS = 40  # random numbers at each position


class Always:
    """Guess in each step."""

    guesses = True

    def note_plain(self) -> None:
        """Judge nothing."""

    def note_round(self, guesses: int, tokens: int) -> None:
        """Judge nothing."""


@dataclass
class Way:
    """One way to decode, and what was measured of it on one text."""

    start: Callable[[], Speculation | None]  # a new one for each text, as for each command
    speeds: list[float] = field(default_factory=list)  # tokens per second, one for each round
    ids: list[int] = field(default_factory=list)
    kept: int = 0
    guessed: int = 0

    def run(self, loaded: LoadedModel, request: Request) -> float:
        """Decode and return the tokens per second after the first one."""
        speculation = self.start()
        batch = Batch(loaded.model, 1, vocab_size=loaded.tokenizer.vocab_size, speculation=speculation)
        batch.join([request])
        self.ids = [token.id for token in batch.step()]
        started = time.perf_counter()
        while batch:
            self.ids += [token.id for token in batch.step()]
        seconds = time.perf_counter() - started
        if speculation is not None:
            self.kept, self.guessed = speculation.take_counts()
        return (len(self.ids) - 1) / seconds


def ways(loaded: LoadedModel, draft: LoadedModel | None, count: int) -> tuple[dict[str, Way], dict[str, Any]]:
    """Return the ways to decode by name, and what a round costs in each."""
    sources: dict[str, tuple[Callable[[], Guesser], int]] = {"lookup": (Lookup, count)}
    if draft is not None:
        sources["draft"] = (lambda: draft_of(draft, loaded)), count
    if is_checkpoint(loaded.path) and has_mtp(loaded.path):
        sources["mtp"] = (lambda: own_draft_of(loaded)), 1
    found, costs = {"no guesses": Way(lambda: None)}, {}
    for name, (source, most) in sources.items():
        costs[name] = round_costs(loaded.model, source(), most)
        found[name] = Way(lambda source=source, most=most, name=name: Speculation(source(), most, Pace(costs[name])))
        found[f"{name}, always"] = Way(lambda source=source, most=most: Speculation(source(), most, Always()))
    return found, {name: [round(cost, 3) for cost in each] for name, each in costs.items()}


def describe(found: dict[str, Way]) -> dict[str, Any]:
    """Return the figures of each way on one text."""
    plain = found["no guesses"]
    result = {}
    for name, way in found.items():
        ratios = [speed / base for speed, base in zip(way.speeds, plain.speeds, strict=True)]
        made = len(way.ids) - 1
        result[name] = {
            "tokens_per_second": round(statistics.median(way.speeds), 1),
            "ratio": [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))],
            "tokens_per_pass": round(made / (made - way.kept), 3),
            "kept": way.kept,
            "guessed": way.guessed,
            "same_text": way.ids == plain.ids,
        }
    return result


@torch.no_grad()
def agreement(loaded: LoadedModel, draft: LoadedModel, ids: list[int], window: int = 128) -> dict[str, float]:
    """Return the share of draws in which both models get the same token, and the highest share possible."""
    same = accepted = 0.0
    for start in range(0, len(ids), window):
        part = torch.tensor([ids[start : start + window]])
        size = loaded.tokenizer.vocab_size
        logits_TV = [each.model(part)[0, :, :size].float() for each in (loaded, draft)]
        found = [candidates(each, DEFAULT) for each in logits_TV]
        dense = [
            torch.zeros(len(each), size).scatter_(1, ids_TC, probs_TC.float() / probs_TC.float().sum(1, True))
            for each, (probs_TC, ids_TC) in zip(logits_TV, found, strict=True)
        ]
        accepted += float(torch.minimum(*dense).sum())
        for number in range(_DRAWS):
            drawn = [draw(*each, [row_generator(number, start + t) for t in range(part.shape[1])]) for each in found]
            same += sum(a == b for a, b in zip(*drawn, strict=True)) / _DRAWS
    return {"tokens": len(ids), "same_draw": round(same / len(ids), 3), "highest": round(accepted / len(ids), 3)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model of the same tokenizer")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--guesses", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "docs" / "tutorial.md")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device("auto")
    keep_freed_memory()
    loaded = load_for_decoding(options.model, device, options.dtype, None, options.quantize)
    draft = load_for_decoding(options.draft, device, options.dtype, None, options.quantize) if options.draft else None
    dtype = options.quantize or dtype_name(loaded.model.embed_tokens.weight.dtype)
    result: dict[str, Any] = {
        "model": Path(options.model).name,
        "parameters": loaded.model.num_parameters()["total"],
        "draft_parameters": None if draft is None else draft.model.num_parameters()["total"],
        "precision": dtype,
        **{name: getattr(options, name) for name in ("guesses", "tokens", "rounds")},
        "threads": torch.get_num_threads(),
        **machine_facts(device),
        "texts": {},
    }
    if draft is not None:
        ids = loaded.tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.text_tokens]
        result["agreement"] = found = agreement(loaded, draft, ids)
        print(f"on {found['tokens']} tokens, {found['same_draw']} of the draws agree; at most {found['highest']} could")
    for text, prompt in TEXTS.items() if options.rounds else ():
        for temperature in (0.0, 0.8):
            sampling = Sampling(temperature, min_new_tokens=options.tokens)
            ids, ends = loaded.tokenizer.encode(prompt), loaded.tokenizer.end_ids
            request = Request(ids, options.tokens, sampling, stop_ids=ends)
            found, result["costs_in_plain_steps"] = ways(loaded, draft, options.guesses)
            for number in range(options.rounds + 1):
                for way in found.values():
                    speed = way.run(loaded, request)
                    if number:
                        way.speeds.append(speed)
            figures = describe(found)
            result["texts"][f"{text}, temperature {temperature:g}"] = figures
            print(f"{text}, temperature {temperature:g}")
            for name, each in figures.items():
                ratio, low, high = each["ratio"]
                print(
                    f"  {name:15} {each['tokens_per_second']:7.1f} tokens/s  {ratio:.2f} ({low:.2f} to {high:.2f})  "
                    f"{each['tokens_per_pass']:.2f} tokens per pass, {each['kept']} of {each['guessed']} guesses kept"
                    + ("" if each["same_text"] else ", another text by rounding"),
                    flush=True,
                )
    if options.rounds:
        print(f"costs of rounds in plain steps: {result['costs_in_plain_steps']}")
    write_json(result, options.out)


if __name__ == "__main__":
    main()
