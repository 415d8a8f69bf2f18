"""The protocols of a source of text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from lightlm.data.readers.texts import Unit
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError


class Source(Protocol):
    """A collection of text documents in a fixed order, read unit by unit."""

    @property
    def name(self) -> str:
        """The data folder's default name."""

    @property
    def spec(self) -> str:
        """The user's request, in a form that does not depend on the working directory."""

    @property
    def description(self) -> str:
        """One line for people."""

    @property
    def fingerprint(self) -> str | None:
        """A text that changes when the content does; None where only the network could tell."""

    @property
    def revision(self) -> str | None:
        """The state of the source that is read: a Hub commit, package versions, or a hash of the files' listing."""

    def units(self) -> Iterator[Unit]:
        """Yield the units in their order. Raises DataError where the source cannot be read."""


@dataclass(frozen=True)
class FileCounts:
    """The files of a source, by suffix: those that are read, and those that it holds and are not read."""

    read: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def file_counts(source: Source) -> FileCounts:
    """Return the attribute `file_counts` of a source of files; nothing for another."""
    counts: FileCounts = getattr(source, "file_counts", FileCounts())
    return counts


def check_unchanged(source: Source) -> None:
    """Raise ChangedError where a source of local files is not as it was when it was opened."""
    check: Callable[[], None] = getattr(source, "check_unchanged", lambda: None)
    check()


class ChangedError(DataError):
    """The source changed while it was read, so that what was read is of no single state."""


@runtime_checkable
class Revisable(Protocol):
    """A source that can be read in an earlier state, so that an interrupted preparation can resume."""

    def at_revision(self, revision: str) -> Source: ...


def at_revision(source: Source, revision: str | None) -> Source:
    """Return the source in the state that an earlier process read, if `revision` names one.

    Raises DataError where the source has changed.
    """
    if revision is None:
        return source
    if isinstance(source, Revisable):  # first: the latest revision may need the network
        return source.at_revision(revision)
    if revision != source.revision:
        raise DataError(
            f"{source.spec} has changed since this preparation began: {revision} then, {source.revision} now. "
            "Use --overwrite to start over."
        )
    return source


Opener = Callable[[str, str, Filter | None], Source]
"""Returns the source that a spec names: (spec, text_column, row_filter).

Only records that `row_filter` keeps are read. Nothing is read yet, and the network is not used. Raises DataError for a
name or path that cannot be read.
"""
