"""A folder with the data sets of the leaderboard's tasks, a few documents each, laid out like the Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

THINGS = ["cat", "dog", "mat", "ran", "sat", "faster"]


def write_set(folder: Path, configs: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Write rows by configuration and split as JSON lines, with the card that names them."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines.append(f"  - {{split: {split}, path: {config}/{split}.jsonl}}")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def arithmark_rows() -> list[dict[str, Any]]:
    """Rows of ArithMark-3, whose endings have different numbers of tokens."""
    return [
        {
            "ind": f"add_{n}",
            "activity_label": "addition",
            "ctx": f"The cat has {n} and gets {n + 3}. The cat has",
            "endings": [f" {2 * n + 3}", f" {n} cats and {n}", f" {n + 12345}", f" {n}"],
            "label": str((3, 3, 3, 1, 0, 2)[n]),
        }
        for n in range(6)
    ]


def write_board(folder: Path, *, arithmark: bool = True) -> None:
    hellaswag = [
        {
            "ind": n,
            "activity_label": "Cats",
            "ctx_a": f"The {thing} sat.",
            "ctx_b": "then it",
            "endings": [f"{ending} on the {thing}" for ending in THINGS[:4]],
            "label": str(n % 4),
        }
        for n, thing in enumerate(THINGS)
    ]
    arc = [
        {
            "id": str(n),
            "question": f"What did the {thing} do?",
            "choices": {"text": [f"it {other}" for other in THINGS[:4]], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        }
        for n, thing in enumerate(THINGS)
    ]
    piqa = [
        {"goal": f"Find the {thing}", "sol1": "look on the mat", "sol2": "ran after it", "label": n % 2}
        for n, thing in enumerate(THINGS)
    ]
    three = {"train": arc, "validation": arc, "test": arc}
    write_set(folder / "Rowan/hellaswag", {"default": {"train": hellaswag, "validation": hellaswag}})
    write_set(folder / "allenai/ai2_arc", {"ARC-Challenge": three, "ARC-Easy": three})
    write_set(folder / "baber/piqa", {"default": {"train": piqa, "validation": piqa}})
    if arithmark:
        write_set(folder / "AxiomicLabs/Arithmark-3.0", {"default": {"train": arithmark_rows()}})
