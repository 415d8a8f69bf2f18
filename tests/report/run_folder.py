"""Run folders like those of training, without training."""

import json
from pathlib import Path

from tests.corpus import TINY_RECIPE

MARKUP = 'The <b>old</b> clock & "quote" </pre><script>alert(1)</script> \x00'


def rows(steps, *, batch=256, first_loss=6.0, last_loss=3.0, every=5, **extra):
    """Return metrics of a run whose loss falls in a straight line, with validation every few steps."""
    found = []
    for step in range(1, steps + 1):
        loss = first_loss + (last_loss - first_loss) * (step - 1) / max(steps - 1, 1)
        row = {
            "step": step,
            "tokens": step * batch,
            "loss": loss,
            "lr": 1e-2,
            "grad_norm": 1.0,
            "tokens_per_second": 512.0,
            "seconds": step * batch / 512,
        }
        if step % every == 0:
            row |= {"val_loss": loss + 0.25, "val_bpb": loss / 3}
        found.append(row | extra)
    return found


def write_run(path: Path, metrics, *, recipe=TINY_RECIPE) -> Path:
    path.mkdir(parents=True)
    text = recipe.replace("max_seq_len: 32", "max_seq_len: 32, vocab_size: 320")
    (path / "recipe.yaml").write_text(text, encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8")
    return path


def write_extras(path: Path) -> None:
    """Write a sample with markup in it, and results of lm-eval."""
    (path / "samples").mkdir()
    (path / "samples/step_000005.txt").write_text(MARKUP, encoding="utf-8")
    (path / "eval").mkdir()
    results = {
        "results": {"hellaswag": {"alias": "hellaswag", "acc_norm,none": 0.3125, "acc_norm_stderr,none": 0.01}},
        "n-samples": {"hellaswag": {"original": 100, "effective": 100}},
        "higher_is_better": {"hellaswag": {"acc_norm": True}},
        "config": {"limit": None},
    }
    (path / "eval/step_000005_hellaswag.json").write_text(json.dumps(results), encoding="utf-8")
    (path / "eval/step_000005_hellaswag.meta.json").write_text("{}", encoding="utf-8")
