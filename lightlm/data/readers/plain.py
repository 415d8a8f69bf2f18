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
    decoder = io.IncrementalNewlineDecoder(_Utf8(file), translate=False)
    pending = ""  # the decoder withholds a CR at the end until it sees what follows
    try:
        with file.open("rb") as opened:
            while block := opened.read(CHUNK_BYTES):
                text = decoder.decode(block).replace("\r\n", "\n")
                if pending and text:
                    yield Texts(_array(pending), unfinished=True)
                pending = text or pending
            text = decoder.decode(b"", final=True)
    except OSError as error:
        raise_machine_fault(error)
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    yield Texts(_array(pending + text))


def _array(text: str) -> pyarrow.Array:
    return pyarrow.array([text], pyarrow.large_string())


class _Utf8(codecs.IncrementalDecoder):
    """UTF-8 without its byte-order mark; its error names the offset in the file."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self._file, self._offset = file, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def decode(self, block: bytes, final: bool = False) -> str:  # type: ignore[override]
        self._offset += len(block)
        try:
            return self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            offset = self._offset - len(error.object) + error.start
            raise DataError(
                f"{self._file}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}. "
                "Convert the file, for example with: iconv -f LATIN1 -t UTF-8"
            ) from error
