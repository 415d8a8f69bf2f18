"""The display of `lightlm prepare-data`: a progress line, and a table at the end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightlm.data.prepare.run import Progress
    from lightlm.data.shards import Manifest

LOG_SECONDS = 10.0
LISTED = 5  # messages about records left out; the manifest has more


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows progress, for any thread: on a terminal in one live line, else every ten seconds."""
    from lightlm.cli.console import console

    status = console.status("reading …") if console.is_terminal else None
    lock = threading.Lock()
    first: Progress | None = None  # of this phase
    since = logged = time.perf_counter()

    def update(progress: Progress) -> None:
        nonlocal first, since, logged
        with lock:
            now = time.perf_counter()
            if progress.message is not None:
                console.print(progress.message, markup=False, soft_wrap=True)
            if first is None or progress.phase != first.phase:
                first, since = progress, now
            text = progress_text(first, progress, now - since)
            if status:
                status.update(text)
            elif now - logged >= LOG_SECONDS:
                logged = now
                console.print(text)

    with status or contextlib.nullcontext():
        yield update


def progress_text(first: Progress, progress: Progress, seconds: float) -> str:
    """Return the progress line `seconds` after `first`; rates exclude what was done before `first`."""
    from lightlm.quantities import format_quantity

    parts = [f"{progress.documents:,} documents", f"{progress.text_bytes / 1e6:,.1f} MB"]
    if progress.tokens:
        parts.append(f"{format_quantity(progress.tokens)} tokens")
    before, done = first.done or 0.0, progress.done
    if progress.target_tokens:
        before, done = first.tokens / progress.target_tokens, min(1.0, progress.tokens / progress.target_tokens)
    if done is not None:
        parts.append(f"{done:.0%}")
    if seconds > 0.5:
        parts.append(f"{(progress.text_bytes - first.text_bytes) / 1e6 / seconds:.1f} MB/s")
        if done is not None and done > before:
            left = int(seconds * (1 - done) / (done - before))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return f"{progress.phase}: {', '.join(parts)}"


def print_summary(summary: dict[str, Any], manifest: Manifest, as_json: bool) -> None:
    from lightlm.cli.console import console, out, print_json

    _warn(manifest)
    if as_json:
        print_json(summary)
        return
    from rich.markup import escape
    from rich.table import Table

    from lightlm.data.coverage import describe_loss

    dropped = manifest.dropped or {"blank": manifest.skipped_documents}  # an older version counts only blank ones
    rows = [
        ("folder", f"{summary['folder']} ({summary['status']})"),
        ("documents" if manifest.chat is None else "conversations", f"{summary['documents']:,}"),
        ("documents from", ": ".join(filter(None, [manifest.description, _causes(manifest.files_read)]))),
        ("files left out", _causes(manifest.files_left_out)),
        ("left out", _causes(dropped) or "nothing"),
        ("flagged", _causes(manifest.flagged)),
        *(
            ("searched for", f"{found['examples']:,} examples of {name}")
            for name, found in manifest.evaluation_sets.items()
        ),
        ("tokens", f"{summary['train_tokens']:,} train, {summary['val_tokens']:,} validation"),
        ("text", f"{summary['text_bytes'] / 1e6:,.1f} MB, {summary['bytes_per_token']:.2f} bytes per token"),
        ("trained tokens", _trained(manifest)),
        ("chat template", _template(manifest)),
        ("lost", describe_loss(manifest.lost)),
        ("vocabulary", f"{summary['vocab_size']:,}"),
        ("separator", f"{manifest.end_of_text} (id {manifest.end_of_text_id})" if manifest.end_of_text else ""),
        ("shards", f"{summary['shards']:,}"),
        ("teacher", _teacher(summary["teacher"])),
    ]
    if manifest.unigram:
        nats, bits = manifest.unigram.nats_per_token, manifest.unigram.bits_per_byte
        rows.append(("unigram entropy", f"{nats:.3f} nats per token, {bits:.3f} bits per byte (models do better)"))
    speed = f" ({summary['megabytes_per_second']:,.1f} MB/s)" if summary["megabytes_per_second"] else ""
    rows.append(("time", f"{summary['seconds']:,.1f} s{speed}"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        if value:
            table.add_row(name, escape(value))
    out.print(table)
    split = "train" if summary["train_tokens"] else "validation"
    for number, text in enumerate(summary.get("samples", ()), start=1):
        out.print(f"\n--- document {number} of the {split} split", markup=False)
        out.print(text, markup=False, soft_wrap=True)
    console.print(f"Next: {summary['next']}", markup=False, soft_wrap=True)


def _trained(manifest: Manifest) -> str:
    if manifest.chat is None:
        return ""
    train, val = (manifest.chat.trained_tokens[split] for split in ("train", "val"))
    return f"{train:,} train, {val:,} validation ({manifest.chat.train_on})"


def _template(manifest: Manifest) -> str:
    if manifest.chat is None:
        return ""
    names = {"tokenizer": "the tokenizer's", "chatml": "ChatML", "file": "as given"}
    added = " ".join(manifest.chat.added_tokens)
    return names[manifest.chat.template] + (f", which adds {added} to the tokenizer" if added else "")


def _teacher(stored: dict[str, Any] | None) -> str:
    if stored is None:
        return ""
    left_out = f"{stored['rest']:.1%} of the mass is that of others"
    return f"the top {stored['top_k']} tokens of {stored['teacher']} in a context of {stored['context']:,}; {left_out}"


def _lacking(manifest: Manifest) -> dict[str, int]:
    """Return the columns of the filter that hardly any record of JSON has, with the number of those that lack them."""
    from lightlm.data.select.filters import FILTERED, Filter, without

    dropped, text = manifest.dropped, manifest.settings.get("filter")
    if manifest.settings.get("max_tokens"):  # records behind the last document are counted, too
        return {}
    records = manifest.documents("train") + manifest.documents("val") + sum(dropped.values())
    found = {}
    for column in Filter(str(text)).columns if text else ():
        cause = without(column)
        left_out = (count for name, count in dropped.items() if name.startswith(FILTERED) and cause in name)
        found[column] = manifest.flagged.get(cause, 0) + sum(left_out)
    cut = 1  # a document that was cut in two for a validation split is counted twice
    return {column: count for column, count in found.items() if count >= max(1, records - cut)}


def _causes(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.items() if count)


def validation_note(manifest: Manifest) -> str:
    """Return the warning for a validation split that is too small, with the option that makes it larger; else nothing.

    `lightlm train` prints it as well.
    """
    small = manifest.small_validation
    used, better = manifest.settings.get("val_fraction"), manifest.suggested_val_fraction
    smaller = not isinstance(used, int | float) or used < better
    larger = f"raise --val-fraction of prepare-data, for example to {better:g}" if smaller else "prepare more text"
    return f"validation is {small}, so its loss says little; {larger}" if small else ""


def _warn(manifest: Manifest) -> None:
    """Print how the result differs from the request."""
    from lightlm.cli.console import console
    from lightlm.data.coverage import describe_loss
    from lightlm.data.prepare.blocks import HOLDS_NUL

    for message in manifest.bad[:LISTED]:
        console.print(f"Left out: {message}", markup=False, soft_wrap=True)
    if len(manifest.bad) > LISTED:
        console.print(f"... {len(manifest.bad) - LISTED:,} more of these are in manifest.json under `bad`.")
    if nul := manifest.flagged.get(HOLDS_NUL):
        console.print(
            f"Warning: the data has {nul:,} document{'s' * (nul != 1)} {HOLDS_NUL}, which text does not have: "
            "its encoding may have been taken for another, for example UTF-16 for Latin-1. Check the source.",
            soft_wrap=True,
        )
    for column, count in _lacking(manifest).items():
        console.print(
            f"Warning: {count:,} records lack {column!r}, which --filter names, and hardly any has it. Check its name.",
            markup=False,
            soft_wrap=True,
        )
    if lost := describe_loss(manifest.lost):
        console.print(f"The data lacks text that the tokenizer does not know: {lost}.", soft_wrap=True)
    if manifest.listed:
        console.print(
            "Documents that share text with evaluation sets, or were not searched, are listed in manifest.json.",
            soft_wrap=True,
        )
    for name, coverage in manifest.evaluation_sets.items():
        if coverage["too_short"]:
            found = f"{coverage['too_short']:,} of {coverage['examples']:,} examples of {name}"
            console.print(f"{found} are too short to be found: they have fewer than 13 words.")
    spec = str(manifest.settings.get("tokenizer"))
    wanted = spec.removeprefix("train:")
    if wanted != spec and manifest.vocab_size < int(wanted):
        console.print(f"The text is too short for {int(wanted):,} entries: the tokenizer has {manifest.vocab_size:,}.")
    if note := validation_note(manifest):
        console.print(f"Warning: {note}.", markup=False, soft_wrap=True)
    if not manifest.tokens("val"):
        console.print("There is no validation split.")
