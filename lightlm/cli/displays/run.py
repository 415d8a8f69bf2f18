"""What `lightlm train` prints before and after a run: its plan, its result and what to do next."""

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lightlm.cli.console import out, print_json
from lightlm.cli.displays.training import TrainingDisplay, describe_source
from lightlm.train.trainer import Result, Trainer

_PROMPT_WORDS = 4  # of the suggested prompt


def print_plan(facts: dict[str, Any], as_json: bool) -> None:
    """Print the sizes of a run (`Setup.facts`) as a table or as JSON."""
    if as_json:
        print_json(facts)
        return
    table = Table(title=f"Run {facts['name']}", show_header=False)
    sources = facts.get("sources") or ()
    shown = facts | {"sources": None} | {f"source {part['name']}": describe_source(part) for part in sources}
    for key, value in shown.items():
        if value is not None and (key != "active_parameters" or value != facts["parameters"]):
            table.add_row(key.replace("_", " "), Text(_in_words(value)))
    out.print(table)


def _in_words(value: Any) -> str:
    match value:
        case bool():  # an int too
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.3g}"
    return str(value)


def draw_report(trainer: Trainer, display: TrainingDisplay) -> Path | None:
    """Write the run's page and plots and return the page. The run is saved already, so a failure is only a note."""
    display.phase("drawing the report")
    try:
        from lightlm.report.build import renew_report

        return renew_report(trainer.run_folder)
    except Exception as error:
        display.note(f"no plots were made ({error}); try `lightlm report {trainer.run_folder}`")
        return None


def print_result(result: Result, trainer: Trainer, page: Path | None, as_json: bool) -> None:
    """Print how a run ended, where its page is, and what to do next; or one JSON document."""
    unigram = None if trainer.data.mixed else trainer.data.main.manifest.unigram
    unigram_entropy = unigram.nats_per_token if unigram else None
    if as_json:
        sources = trainer.setup.sources(trainer.progress.samples) if trainer.data.mixed else None
        print_json(vars(result) | {"unigram_entropy": unigram_entropy, "sources": sources, "report": page})
        return
    lines = [f"Run {result.run}: step {result.step:,}, {result.tokens:,} tokens, {result.seconds:.0f} s"]
    if result.val_loss is not None:
        lines.append(f"Validation loss {result.val_loss:.4f} nats per token, {result.val_bpb:.4f} bits per byte")
        if unigram_entropy is not None:
            lines.append(f"Unigram entropy of the corpus {unigram_entropy:.4f} nats per token")
    for part in trainer.setup.sources(trainer.progress.samples) if trainer.data.mixed else ():
        lines.append(f"Source {part['name']}: {describe_source(part)}")
    if result.stopped_early:
        patience = trainer.recipe.train.patience
        validations = "validation" if patience == 1 else "validations"
        lines.append(f"Stopped early: {patience} {validations} without a new best (train.patience)")
    if trainer.recipe.checkpoint.keep_best and result.best_step is not None:
        best = (result.run / "checkpoints" / "best").as_posix()
        lines.append(f"Best validation loss {result.best_val_loss:.4f} at step {result.best_step:,}: {best}")
    if page is not None:
        lines.append(f"Plots and page: {page}")
    if not result.interrupted:
        lines.append("Next: " + "; ".join(_next_commands(trainer)))
    out.print("\n".join(lines), soft_wrap=True, markup=False)


def _next_commands(trainer: Trainer) -> list[str]:
    """Return commands to try on a finished run. The prompt is the beginning of a text of its own data."""
    if trainer.data.main.manifest.chat is not None:
        return [
            f"lightlm generate --chat {shlex.quote(next(iter(trainer.recipe.eval.prompts), 'Hello'))}",
            "lightlm convert",
        ]
    words = trainer.data.main.beginnings(1)[0].split()[:_PROMPT_WORDS]
    prompt = shlex.quote(" ".join(words).replace("\N{REPLACEMENT CHARACTER}", "") or "Hello")
    held_out = ["lightlm eval --tasks heldout"] if len(trainer.data.main.split("val")) else []
    return [*held_out, f"lightlm generate {prompt}", "lightlm convert"]
