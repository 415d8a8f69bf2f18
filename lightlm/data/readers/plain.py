"""Plain text (.txt, .text, .md): a file is one document, read in parts."""

import codecs
import io
from collections.abc import Iterator
from functools import partial

import pyarrow

from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.readers.file import File
from lightlm.data.readers.opening import open_text
from lightlm.data.readers.recognition import HEAD_BYTES, holds_nul, not_utf8
from lightlm.data.readers.texts import CHUNK_BYTES, LARGE_BYTES, BadRecord, Texts, Unit, unreadable
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError


def plain_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield the one unit of a text file; it has no columns, and so no conversation."""
    if isinstance(text_column, ChatColumns):
        fault = DataError(
            f"{file}: plain text holds no conversations; write them as lines of JSON with {text_column.wanted}"
        )
        yield Unit(name, partial(unreadable, fault), file.stat().st_size)
        return
    yield Unit(name, partial(read_text, file), file.stat().st_size)


def read_text(file: File, bad: BadRecord) -> Iterator[Texts]:
    """Yield the document, in parts if it is large. Line ends become \\n, and a byte-order mark is left out."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(None, translate=False)  # withholds a CR at the end until it sees what follows
    pending, offset, head = "", 0, b""
    held: list[str] = []  # until it is known whether they are parts of a large text
    with open_text(file) as opened:
        try:
            while block := opened.read(CHUNK_BYTES):
                head = head or block[:HEAD_BYTES]
                if b"\0" in block:
                    raise holds_nul(str(file), head, f" at offset {offset + block.index(bytes(1))}")
                offset += len(block)
                text = lines.decode(utf8.decode(block)).replace("\r\n", "\n")
                if pending and text:
                    held.append(pending)
                    if offset > LARGE_BYTES:
                        yield from (Texts(_array(part), unfinished=True) for part in held)
                        held = []
                pending = text or pending
            text = lines.decode(utf8.decode(b"", final=True), final=True)
        except UnicodeDecodeError as error:
            place = offset - len(error.object) + error.start
            around = error.object[max(0, error.start - HEAD_BYTES // 2) : error.start + HEAD_BYTES // 2]
            sample = around if place > HEAD_BYTES else head
            raise not_utf8(str(file), sample, error.object[error.start], f"at offset {place}") from error
    yield Texts(_array("".join([*held, pending, text])))


def _array(text: str) -> pyarrow.Array:
    return pyarrow.array([text], pyarrow.large_string())
