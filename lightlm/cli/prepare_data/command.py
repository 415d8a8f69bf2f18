"""`lightlm prepare-data`: text to token shards."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightlm.data.prepare.executors import Engine
    from lightlm.data.shards import Manifest

_CHAT_CONTEXT = 1024  # train.seq_len of recipes/chat.yaml
FROM_MANIFEST = (
    "source", "description", "files_read", "files_left_out", "skipped_documents", "dropped", "flagged", "lost",
    "evaluation_sets", "vocab_size", "end_of_text", "end_of_text_id", "unigram", "chat",
)  # fmt: skip

# The options that go with one that prepares nothing.
_HONORED = {
    "--download-only": ("source", "tokenizer", "text_column", "download_only", "as_json"),
    "--verify": ("source", "tokenizer", "out", "text_column", "form", "val_fraction", "verify", "sample", "as_json"),
}


def prepare_data(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="pydocs, skills, fineweb-edu, another named data set, hf:org/name[:config]\\[@revision], a file, "
            "folder or glob of .txt .md .jsonl .json .csv .tsv (also .gz .zst .xz .bz2) .parquet, or - for standard "
            "input",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="gpt2|MODEL|PATH|train:N",
            help="gpt2; that of a run, a model folder or a Hub id; a tokenizer.json; "
            "or train:N for a new one of N entries. Default: gpt2; pydocs: train:8192; "
            "skills: train:512.",
        ),
    ] = None,
    eot: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="The token after each document. Default: the one that the tokenizer names."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write. Default: data/NAME.")] = None,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="The column or JSON key with the text; dots lead to nested ones.")
    ] = "text",
    form: Annotated[
        Literal["text", "chat", "messages", "sharegpt", "prompt", "alpaca"],
        typer.Option(
            "--format",
            metavar="text|chat|messages|sharegpt|prompt|alpaca",
            help="text; chat: conversations, the form of each record detected; or the one form to read.",
        ),
    ] = "text",
    train_on: Annotated[
        Literal["all", "assistant", "last"] | None,
        typer.Option(
            metavar="all|assistant|last",
            help="The tokens of a conversation that a model learns to write. Default: assistant.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A chat template (Jinja). Default: the tokenizer's, else ChatML."),
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Stop after the document that reaches N tokens, for example 1B.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Share of documents for validation, 0 for none, 1 for data that models are only scored on. "
            "Default: 0.005; pydocs: 0.05; skills: 0.02.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Threads or Ray tasks. Default: one per core, at most 8 threads.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over and replace the folder.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check a finished folder, checksums included. SOURCE may be the folder.")
    ] = False,
    download_only: Annotated[
        bool, typer.Option("--download-only", help="Fetch a Hub data set and the tokenizer into the Hub's cache.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip records that cannot be read; count and list them.")
    ] = False,
    encoder: Annotated[
        Literal["auto", "gigatoken", "tokenizers"],
        typer.Option(metavar="auto|gigatoken|tokenizers", help="The tokenizer library; the tokens are the same."),
    ] = "auto",
    mix: Annotated[str | None, typer.Option(hidden=True, help="Of earlier versions: refused.")] = None,
    filter_text: Annotated[
        str | None, typer.Option("--filter", metavar="EXPR", help="Read only rows such as 'score >= 3'.")
    ] = None,
    dedup: Annotated[
        Literal["exact", "near"] | None,
        typer.Option(metavar="exact|near", help="Leave out documents that repeat an earlier one."),
    ] = None,
    decontaminate: Annotated[
        str | None,
        typer.Option(metavar="T1,T2", help="Find documents that share 13 words in a row with lm-eval's tasks."),
    ] = None,
    contaminated: Annotated[
        Literal["drop", "flag"],
        typer.Option(metavar="drop|flag", help="Leave those documents out, or only count and list them."),
    ] = "drop",
    engine: Annotated[
        Literal["threads", "ray"],
        typer.Option(metavar="threads|ray", help="Run on this machine or on a Ray cluster; the folder is the same."),
    ] = "threads",
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also store a larger model's next-token probabilities, for train.distill."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Store the teacher's K likeliest tokens at each place. Default: 64.")
    ] = None,
    teacher_context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Maximum number of tokens that the teacher sees. Default: its context, at most 1,024."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The cluster of --engine ray. Default: RAY_ADDRESS, or this machine's."),
    ] = None,
    sample: Annotated[int, typer.Option(metavar="N", help="Show the beginnings of N documents at the end.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Turn text into token shards: data/NAME with manifest.json, tokenizer.json and .bin files."""
    from lightlm.cli.displays.preparation import print_summary, progress_line
    from lightlm.cli.prepare_data.selection import (
        evaluation_sets,
        open_named,
        opened,
        read_template,
        refuse_mixture,
    )
    from lightlm.cli.prepare_data.teacher import check_options, check_tokenizer, store
    from lightlm.data.chat.conversation import columns_of
    from lightlm.data.folder import DataFolder
    from lightlm.data.prepare.run import prepare
    from lightlm.data.select.filters import Filter
    from lightlm.data.sources.skills import SKILLS_SOURCE
    from lightlm.errors import UsageError
    from lightlm.quantities import parse_quantity
    from lightlm.train.signals import interrupted_by_signals

    refuse_mixture(source, mix)
    if download_only:
        from lightlm.cli.prepare_data.download import download_data

        _refuse_other_options(context, "--download-only", "fetches whole files and prepares nothing")
        return download_data(open_named(source, text_column, None), tokenizer, as_json)
    if verify:
        _refuse_other_options(context, "--verify", "checks a finished folder and prepares nothing")
    check_options(teacher, top_k, teacher_context, val_fraction)
    if form == "text" and source != SKILLS_SOURCE and train_on is not None:
        raise UsageError(f"--train-on {train_on} is for conversations: add --format chat")
    text_column, template = columns_of(form, text_column, train_on or "assistant"), read_template(chat_template)
    chosen_engine = _choose_engine(engine, workers, ray_address)
    started = time.perf_counter()
    try:
        limit = None if max_tokens is None else parse_quantity(max_tokens)
    except ValueError as error:
        raise UsageError(f"--max-tokens {max_tokens}: {error}") from error
    row_filter = None if filter_text is None else Filter(filter_text)
    if verify:
        folder = out or _finished_folder(source) or Path("data") / open_named(source, text_column, row_filter).name
        manifest = DataFolder.open(folder).verify()
    else:
        sets = evaluation_sets(decontaminate, contaminated)
        with (
            interrupted_by_signals(),
            opened(source, text_column, row_filter, out) as (text_source, folder),
            progress_line() as update,
            _told_how_to_resume(folder),
        ):
            if teacher is not None:
                check_tokenizer(teacher, tokenizer, text_source)
            manifest = prepare(
                text_source, tokenizer, folder, text_column=text_column, max_tokens=limit,
                val_fraction=val_fraction, workers=workers, overwrite=overwrite, skip_bad=skip_bad,
                encoder=encoder, dedup=dedup, decontaminate=sets, filter=row_filter, end_of_text=eot,
                train_on=train_on or "assistant", chat_template=template, engine=chosen_engine,
                progress=update,
            )  # fmt: skip
            if teacher is not None:
                store(teacher, folder, top_k, teacher_context, update)
    summary = _summary(manifest, folder, tokenizer, time.perf_counter() - started, verified=verify)
    if sample:
        summary["samples"] = DataFolder.open(folder).beginnings(sample)
    print_summary(summary, manifest, as_json)


def _refuse_other_options(context: typer.Context, only: str, does: str) -> None:
    """Raise UsageError for an option that would have no effect beside `only`."""
    from lightlm.errors import UsageError

    given = {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
    options = [option.opts[0] for option in context.command.params if option.name in given - set(_HONORED[only])]
    if options:
        raise UsageError(
            f"{only} {does}, so {', '.join(options)} would have no effect; give it to the command that prepares instead"
        )


def _choose_engine(engine: str, workers: int | None, ray_address: str | None) -> Engine | None:
    """Return the engine that runs the blocks; None for threads of this process."""
    if engine == "ray":
        from lightlm.data.prepare.ray import RayEngine

        return RayEngine(workers, ray_address)
    if ray_address is not None:
        from lightlm.errors import UsageError

        raise UsageError("--ray-address is for --engine ray")
    return None


@contextlib.contextmanager
def _told_how_to_resume(folder: Path) -> Iterator[None]:
    """Context manager that says, after an interruption, that the same command resumes, if there is progress."""
    from lightlm.cli.console import console
    from lightlm.data.prepare.workspace import Workspace
    from lightlm.data.top_tokens import unfinished

    try:
        yield
    except KeyboardInterrupt:
        if Workspace(folder.absolute()).path.exists() or unfinished(folder).exists():
            console.print("Stopped. Progress is saved. Rerun the same command to resume.")
        raise


def _finished_folder(source: str | None) -> Path | None:
    """Return the prepared folder that SOURCE names, by path or by name under data/; its text may be deleted."""
    from lightlm.data.sources.stdin import NAME, SPEC

    if source is None:
        return None
    source = NAME if source == SPEC else source
    folders = (Path(source).expanduser(), Path("data") / source)
    return next((folder for folder in folders if (folder / "manifest.json").is_file()), None)


def _start(tokenizer: str) -> str:
    """Return the overrides with which a run starts from the model of a tokenizer; empty if it is a tokenizer only."""
    from lightlm.convert.load import find_start
    from lightlm.data.tokenizer.named import tokenizer_path
    from lightlm.errors import LightLMError

    path = tokenizer_path(tokenizer)
    if path is not None and not (path / "config.json").is_file():
        return ""
    start = " " + shlex.quote(f"train.init_from={tokenizer}")
    context = _CHAT_CONTEXT
    with contextlib.suppress(LightLMError):  # `train` says what is wrong with it
        context = context if path is None else find_start(tokenizer).model.max_seq_len
    return start + (f" train.seq_len={context}" if context < _CHAT_CONTEXT else "")


def _summary(
    manifest: Manifest, folder: Path, tokenizer: str | None, seconds: float, *, verified: bool
) -> dict[str, Any]:
    """Return what `--json` prints and the table shows."""
    from lightlm.data.folder import dataset_reference
    from lightlm.data.top_tokens import read_stored_teacher

    stored = read_stored_teacher(folder)
    text_bytes = sum(manifest.text_bytes.values())
    unread = verified or manifest.already_prepared
    # A new tokenizer is no model's, so its conversations train a new one.
    new = str(manifest.settings.get("tokenizer")).startswith("train:")
    recipe = "demo" if manifest.chat is None else "chat-demo" if new else "chat"
    # The demo recipes read these by default.
    default = recipe != "chat" and folder in (Path("data/pydocs"), Path("data/skills"))
    dataset = "" if default else " " + shlex.quote(f"data.dataset={dataset_reference(folder)}")
    spec = tokenizer or str(manifest.settings.get("tokenizer"))
    start = _start(spec) if recipe == "chat" and not spec.startswith("sha256 ") else ""
    taught = "" if stored is None else " train.distill.teacher=stored"
    training = f"lightlm train recipes/{recipe}.yaml{dataset}{start}{taught}"
    scoring = f"lightlm eval MODEL --tasks heldout --data {shlex.quote(folder.as_posix())}"
    return {
        "folder": folder.as_posix(),
        **manifest.model_dump(include=set(FROM_MANIFEST)),
        "status": "verified" if verified else "already prepared" if manifest.already_prepared else "prepared",
        "documents": manifest.documents("train") + manifest.documents("val"),
        "train_tokens": manifest.tokens("train"),
        "val_tokens": manifest.tokens("val"),
        "small_validation": manifest.small_validation or None,
        "text_bytes": text_bytes,
        "bytes_per_token": manifest.bytes_per_token,
        "shards": len(manifest.shards),
        "seconds": round(seconds, 3),
        "megabytes_per_second": None if unread else round(text_bytes / 1e6 / seconds, 1),
        "teacher": None if stored is None else stored.model_dump(exclude={"of", "shards"}),
        "next": training if manifest.tokens("train") else scoring,
    }
