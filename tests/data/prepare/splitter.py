"""The rule that splits documents, said document by document: what blocks, whatever their borders, must come to."""

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from lightlm.data.shards import Split


@dataclass(frozen=True)
class Document:
    """A text with its token ids (without the end-of-text id)."""

    text: str
    ids: list[int]

    @property
    def key(self) -> int:
        """The hash that decides its split, from 0 to 2**32 - 1."""
        return xxhash.xxh3_64_intdigest(self.text.encode()) % 2**32


class Splitter:
    """Sends each document to a split as it comes, holding back at most one.

    The one held back is the first document, until it is known not to be the only one; and, as long as no document
    has been for validation, the one with the smallest hash, which is then the whole validation split.
    """

    def __init__(self, val_fraction: float) -> None:
        self._fraction = val_fraction
        self._documents = 0
        self._held: Document | None = None
        self._validated = val_fraction == 0  # zero asks for no validation split at all

    def route(self, document: Document) -> Iterator[tuple[Split, Document]]:
        """The documents whose split is now known."""
        self._documents += 1
        if self._documents == 1:
            self._held = document
            return
        first, self._held = (self._held, None) if self._documents == 2 else (None, self._held)
        for candidate in (first, document):
            if candidate is not None:
                yield from self._decide(candidate)

    def _decide(self, document: Document) -> Iterator[tuple[Split, Document]]:
        if document.key < self._fraction * 2**32:
            self._validated = True
            yield "val", document
        elif not self._validated and (self._held is None or document.key < self._held.key):
            document, self._held = self._held, document  # type: ignore[assignment]
            if document is not None:
                yield "train", document
        else:
            yield "train", document
        if self._validated and self._held is not None:
            yield "train", self._held
            self._held = None

    def finish(self) -> Iterator[tuple[Split, Document]]:
        """The document held back, after the last; for a source of one document see `only_document`."""
        if self._held is not None and self._documents > 1:
            yield "val", self._held

    @property
    def only_document(self) -> str | None:
        """The text of the document held back where it was the only one."""
        return self._held.text if self._held is not None and self._documents == 1 else None


def cut_near_end(text: str, val_fraction: float) -> tuple[str, str]:
    """A text as (train, val), cut after the last line (else word) that ends before the last `val_fraction` of it.

    The second part is empty where there is no such place, or no validation is wanted.
    """
    limit = int(len(text) * (1 - val_fraction))
    for border in ("\n", " "):
        cut = text.rfind(border, 0, limit) + 1
        if val_fraction > 0 and text[:cut].strip() and text[cut:].strip():
            return text[:cut], text[cut:]
    return text, ""
