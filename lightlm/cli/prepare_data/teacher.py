"""`lightlm prepare-data --teacher`: what a larger model says of each next token."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightlm.data.prepare.run import Progress
    from lightlm.data.sources.base import Source


def check_options(teacher: str | None, top_k: int | None, context: int | None, val_fraction: float | None) -> None:
    """Raise UsageError for an option that needs a teacher, or one that leaves it nothing to say."""
    from lightlm.errors import UsageError

    for option, given in (("--top-k", top_k), ("--teacher-context", context)):
        if given is not None and teacher is None:
            raise UsageError(f"{option} is for what a teacher says: add --teacher MODEL")
    if teacher is not None and val_fraction == 1:
        raise UsageError("--val-fraction 1 leaves no text to train on, so a --teacher has nothing to say; leave it out")


def check_tokenizer(teacher: str, tokenizer: str | None, source: Source) -> None:
    """Raise UsageError where the teacher has another tokenizer than the data will have, before hours of work."""
    from lightlm.data.prepare.options import defaults
    from lightlm.data.sources.hub.client import download_tokenizer
    from lightlm.data.tokenizer import load_tokenizer
    from lightlm.data.tokenizer.named import requested_vocab_size
    from lightlm.errors import UsageError

    chosen = tokenizer or defaults(source)[0]
    if requested_vocab_size(chosen) is not None:
        difference = "that one is trained on the text"
    else:
        ours, theirs = (load_tokenizer(name, download_tokenizer) for name in (chosen, teacher))
        difference = theirs.difference(ours)
    if difference:
        raise UsageError(
            f"--teacher {teacher} has another tokenizer than {chosen}: {difference}. Add --tokenizer "
            f"{shlex.quote(teacher)}"
        )


def store(
    teacher: str, folder: Path, top_k: int | None, context: int | None, update: Callable[[Progress], None]
) -> None:
    """Store a teacher's probabilities beside a finished folder, and show progress."""
    from lightlm.data.folder import DataFolder
    from lightlm.data.prepare.run import Progress
    from lightlm.train.teaching.store import TOP_K, store_teacher

    manifest = DataFolder.open(folder).manifest
    documents, text_bytes = manifest.documents("train"), manifest.text_bytes["train"]

    def report(done: int, total: int) -> None:
        share = done / max(total, 1)
        update(Progress("asking the teacher", round(share * documents), round(share * text_bytes), done, total))

    def note(message: str) -> None:
        update(Progress("reading the teacher", 0, 0, 0, None, message=message))

    store_teacher(folder, teacher, top_k=TOP_K if top_k is None else top_k, context=context, note=note, report=report)
