"""`lightlm prepare-data`: text to token shards."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lightlm.data.prepare import Progress
    from lightlm.data.shards import Manifest

# pydocs must work without a network, and its 9 MB are no match for a vocabulary of 50,257. Its 1,600 documents
# need a larger share too: 0.5% would be 8 of them, too few for a steady validation loss.
PYDOCS_TOKENIZER, PYDOCS_VAL_FRACTION = "train:8192", 0.05
TOKENIZER, VAL_FRACTION = "gpt2", 0.005


def prepare_data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="pydocs, fineweb-edu, another named data set, hf:org/name[:config][@revision], or a file or folder of "
            ".txt .md .jsonl[.gz|.zst] .parquet",
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="gpt2|HUB_ID|PATH|train:N", help=f"Default: {TOKENIZER}; for pydocs {PYDOCS_TOKENIZER}."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write. Default: data/NAME.")] = None,
    text_column: Annotated[str, typer.Option(metavar="NAME", help="The column or JSON key with the text.")] = "text",
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Stop after the document that reaches N tokens, for example 1B.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Share of documents for validation. Default: {VAL_FRACTION}; pydocs {PYDOCS_VAL_FRACTION}.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Threads that tokenize. Default: all cores.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare again, replacing a finished folder.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Prepare nothing: check a finished folder (SOURCE may be the folder), checksums included."
        ),
    ] = False,
    download_only: Annotated[
        bool,
        typer.Option(
            "--download-only",
            help="Prepare nothing: fetch a Hub data set and the tokenizer into the Hub's cache, for HF_HUB_OFFLINE=1.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Turn text into token shards: data/NAME with manifest.json, tokenizer.json and .bin files."""
    from lightlm.data.prepare import prepare
    from lightlm.data.prepare import verify as verify_folder
    from lightlm.data.sources import PYDOCS, open_source

    if download_only:
        from lightlm.cli.download_data import download_data

        return download_data(open_source(source, text_column), tokenizer or TOKENIZER, as_json)
    started = time.perf_counter()
    limit = _tokens(max_tokens)
    if verify:
        folder = out or _finished_folder(source) or Path("data") / open_source(source, text_column).name
        manifest = verify_folder(folder)
    else:
        opened = open_source(source, text_column)
        folder = out or Path("data") / opened.name
        embedded = opened.name == PYDOCS and opened.spec == PYDOCS
        with _sigterm_as_interrupt(), _ProgressLine() as line:
            manifest = prepare(
                opened,
                tokenizer or (PYDOCS_TOKENIZER if embedded else TOKENIZER),
                folder,
                text_column=text_column,
                max_tokens=limit,
                val_fraction=_first(val_fraction, PYDOCS_VAL_FRACTION if embedded else VAL_FRACTION),
                workers=workers,
                overwrite=overwrite,
                progress=line.update,
            )
    summary = _summary(manifest, folder, time.perf_counter() - started, verified=verify)
    _print(summary, manifest, as_json)


def _finished_folder(source: str) -> Path | None:
    """The prepared folder that SOURCE itself names, by path or by name under data/; its text may be long gone."""
    folders = (Path(source).expanduser(), Path("data") / source)
    return next((folder for folder in folders if (folder / "manifest.json").is_file()), None)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM (kill, a job scheduler's time limit) end the block as Ctrl-C does: half a folder is removed."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in no other
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def _tokens(text: str | None) -> int | None:
    from lightlm.errors import UsageError
    from lightlm.quantities import parse_quantity

    if text is None:
        return None
    try:
        return parse_quantity(text)
    except ValueError as error:
        raise UsageError(f"--max-tokens {text}: {error}") from error


class _ProgressLine:
    """One live line on a terminal; elsewhere (a log file) a line every ten seconds."""

    LOG_SECONDS = 10.0

    def __init__(self) -> None:
        from rich.status import Status

        from lightlm.cli.console import console

        self._console = console
        self._status = Status("reading …", console=console) if console.is_terminal else None
        self._phase, self._since, self._logged = "", time.perf_counter(), time.perf_counter()

    def __enter__(self) -> _ProgressLine:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self, progress: Progress) -> None:
        """Show how far the preparation has come."""
        now = time.perf_counter()
        if progress.phase != self._phase:
            self._phase, self._since = progress.phase, now
        text = self._text(progress, now - self._since)
        if self._status:
            self._status.update(text)
        elif now - self._logged >= self.LOG_SECONDS:
            self._logged = now
            self._console.print(text)

    @staticmethod
    def _text(progress: Progress, seconds: float) -> str:
        from lightlm.quantities import format_quantity

        megabytes = progress.text_bytes / 1e6
        parts = [f"{progress.documents:,} documents", f"{megabytes:,.1f} MB"]
        if progress.tokens:
            parts.append(f"{format_quantity(progress.tokens)} tokens")
        if progress.target_tokens:
            parts.append(f"{progress.tokens / progress.target_tokens:.0%}")
        if seconds > 0.5:  # the first report of a phase sets the clock
            parts.append(f"{megabytes / seconds:.1f} MB/s")
        return f"{progress.phase}: {', '.join(parts)}"


def _summary(manifest: Manifest, folder: Path, seconds: float, *, verified: bool) -> dict[str, Any]:
    """What `--json` prints and the table shows."""
    return {
        "folder": folder.as_posix(),
        "source": manifest.source,
        "status": "verified" if verified else "already prepared" if manifest.already_prepared else "prepared",
        "documents": manifest.documents("train") + manifest.documents("val"),
        "skipped_documents": manifest.skipped_documents,
        "train_tokens": manifest.tokens("train"),
        "val_tokens": manifest.tokens("val"),
        "text_bytes": sum(manifest.text_bytes.values()),
        "bytes_per_token": manifest.bytes_per_token,
        "vocab_size": manifest.vocab_size,
        "shards": len(manifest.shards),
        "unigram": manifest.unigram.model_dump() if manifest.unigram else None,
        "seconds": round(seconds, 3),
        "next": _next_command(folder),
    }


def _next_command(folder: Path) -> str:
    """The command to run next; the demo recipe reads data/pydocs by itself."""
    from lightlm.data.shards import dataset_reference

    if folder == Path("data/pydocs"):
        return "lightlm train recipes/demo.yaml"
    return f"lightlm train recipes/demo.yaml {shlex.quote(f'data.dataset={dataset_reference(folder)}')}"


def _print(summary: dict[str, Any], manifest: Manifest, as_json: bool) -> None:
    from lightlm.cli.console import console, out, print_json

    _warn(manifest)
    if as_json:
        print_json(summary)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    skipped = f" ({summary['skipped_documents']:,} blank ones left out)" if summary["skipped_documents"] else ""
    rows = [
        ("folder", f"{summary['folder']} ({summary['status']})"),
        ("documents", f"{summary['documents']:,}{skipped}"),
        ("tokens", f"{summary['train_tokens']:,} train, {summary['val_tokens']:,} validation"),
        ("text", f"{summary['text_bytes'] / 1e6:,.1f} MB, {summary['bytes_per_token']:.2f} bytes per token"),
        ("vocabulary", f"{summary['vocab_size']:,}"),
        ("shards", f"{summary['shards']:,}"),
    ]
    if manifest.unigram:
        nats, bits = manifest.unigram.nats_per_token, manifest.unigram.bits_per_byte
        rows.append(
            ("unigram entropy", f"{nats:.3f} nats per token, {bits:.3f} bits per byte (a model must do better)")
        )
    rows.append(("time", f"{summary['seconds']:,.1f} s"))
    for name, value in rows:
        table.add_row(name, escape(value))
    out.print(table)
    console.print(f"Next: {summary['next']}", markup=False, soft_wrap=True)


def _warn(manifest: Manifest) -> None:
    """Say where the result is not quite what was asked for."""
    from lightlm.cli.console import console

    spec = str(manifest.settings.get("tokenizer"))
    wanted = spec.removeprefix("train:")
    if wanted != spec and manifest.vocab_size < int(wanted):
        console.print(f"The text is too short for {int(wanted):,} entries: the tokenizer has {manifest.vocab_size:,}.")
    if not manifest.tokens("val"):
        console.print("There is no validation split.")
