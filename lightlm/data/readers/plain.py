"""Plain text files (.txt, .md): a file is one document, read in parts."""

import codecs
import io
from collections.abc import Iterator
from functools import partial

import pyarrow

from lightlm.data.readers.file import File, raise_machine_fault
from lightlm.data.readers.texts import CHUNK_BYTES, BadRecord, Texts, Unit
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError


def plain_units(file: File, name: str, text_column: str, row_filter: Filter | None) -> Iterator[Unit]:
    """Yield the one unit of a text file; it has no columns."""
    yield Unit(name, partial(read_text, file), file.stat().st_size)


def read_text(file: File, bad: BadRecord) -> Iterator[Texts]:
    """Yield the document in parts. Line ends become \\n, and a byte-order mark is left out."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(None, translate=False)  # withholds a CR at the end until it sees what follows
    pending, offset = "", 0
    try:
        with file.open("rb") as opened:
            while block := opened.read(CHUNK_BYTES):
                offset += len(block)
                text = lines.decode(utf8.decode(block)).replace("\r\n", "\n")
                if pending and text:
                    yield Texts(_array(pending), unfinished=True)
                pending = text or pending
            text = lines.decode(utf8.decode(b"", final=True), final=True)
    except UnicodeDecodeError as error:
        place = offset - len(error.object) + error.start
        raise DataError(
            f"{file}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place}. "
            "Convert the file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    yield Texts(_array(pending + text))


def _array(text: str) -> pyarrow.Array:
    return pyarrow.array([text], pyarrow.large_string())
