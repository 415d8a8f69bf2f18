"""Opening a file of text: decompressed as its suffix says, in UTF-8 whatever its byte-order mark says."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

import zstandard

from lightlm.data.readers.file import File, raise_machine_fault
from lightlm.data.readers.recognition import HEAD_BYTES, byte_order_mark, compression_of, refuse_pointer, what_it_is
from lightlm.errors import DataError

BUFFER_BYTES = 1 << 20
ZSTD_WINDOW_BYTES = 1 << 31  # zstd --long=31; a frame made without --long takes 8 MB at most
ZSTD_INPUT_BYTES = 16 << 10  # at once, so that what they expand to stays small


class _Zstd(io.RawIOBase):
    """The content of a .zst file, frame after frame. Raises EOFError where the file ends inside a frame."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._rest, self._content = raw, b"", memoryview(b"")
        self._make = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj
        self._frame = self._make()
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._content:
            data = self._rest or self._raw.read(ZSTD_INPUT_BYTES)
            if not data:
                if self._inside:
                    raise EOFError("the file ends inside a frame")
                return 0
            try:
                self._content, self._rest = memoryview(self._frame.decompress(data)), b""
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._inside = not self._frame.eof
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, self._make()
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


class _ByPieces(io.RawIOBase):
    """The content of a compressed file, as much at once as is decoded: a larger read would lose it to later damage."""

    def __init__(self, opened: Callable[[BinaryIO], Any], raw: BinaryIO) -> None:
        self._content = opened(raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._content.read1(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


Decompress = Callable[[BinaryIO], io.RawIOBase]
COMPRESSIONS: dict[str, Decompress] = {
    ".gz": partial(_ByPieces, gzip.open),
    ".zst": _Zstd,
    ".xz": partial(_ByPieces, lzma.open),
    ".bz2": partial(_ByPieces, bz2.open),
}


class _Recoded(io.RawIOBase):
    """The content of a file in another encoding, as UTF-8."""

    def __init__(self, raw: BinaryIO, encoding: str) -> None:
        self._raw, self._encoding = raw, encoding
        self._decoder, self._content, self._done = codecs.getincrementaldecoder(encoding)(), memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._content and not self._done:
            data = self._raw.read(BUFFER_BYTES)
            self._done = not data
            try:
                self._content = memoryview(self._decoder.decode(data, final=self._done).encode())
            except UnicodeDecodeError as error:
                fault = f"its byte-order mark says {self._encoding}, but it is not: {error.reason}"
                raise _WrongEncodingError(fault) from error
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


class _WrongEncodingError(OSError):
    """The content is not in the encoding that its byte-order mark names."""


@contextlib.contextmanager
def open_text(file: File) -> Iterator[io.BufferedReader]:
    """Context manager for the text of a file as UTF-8, without a byte-order mark.

    Raises DataError, also for what fails in the `with` block, where the file cannot be opened, is a Git LFS pointer, is
    compressed otherwise than its suffix says, or is damaged.
    """
    suffix = next((suffix for suffix in COMPRESSIONS if file.name.lower().endswith(suffix)), None)
    try:
        with file.open("rb") as raw:
            head = raw.read(HEAD_BYTES)
            raw.seek(0)
            refuse_pointer(file, head)
            stream = raw
            if suffix is not None and head:
                _check_compression(file, suffix, head)
                stream = io.BufferedReader(COMPRESSIONS[suffix](raw), BUFFER_BYTES)
            mark = byte_order_mark(head_of(stream))
            if mark is not None:
                stream.read(mark[1])
                if mark[0] != "utf-8":
                    stream = io.BufferedReader(_Recoded(stream, mark[0]), BUFFER_BYTES)
            yield stream  # type: ignore[misc]
    except _WrongEncodingError as error:
        raise DataError(f"{file}: {error}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise_machine_fault(error)
        if suffix is None or getattr(error, "errno", None):
            raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        raise DataError(f"{file}: damaged or truncated ({error})") from error


def first_text(head: bytes, suffix: str) -> str:
    """Return the beginning of the text in the first bytes of a file with this compression, "" for none."""
    opened: Any = COMPRESSIONS[suffix](io.BytesIO(head)) if suffix else io.BytesIO(head)
    content = b""
    with contextlib.suppress(OSError, EOFError, zlib.error, lzma.LZMAError):
        while len(content) < HEAD_BYTES and (data := opened.read(HEAD_BYTES)):
            content += data
    mark = byte_order_mark(content)
    return content[mark[1] :].decode(mark[0], "replace") if mark else content.decode("utf-8", "replace")


def head_of(stream: BinaryIO) -> bytes:
    """Return the next bytes of a buffered stream without consuming them, up to `HEAD_BYTES`; none at its end."""
    peek: bytes = stream.peek(HEAD_BYTES)  # type: ignore[attr-defined]
    return peek[:HEAD_BYTES]


def _check_compression(file: File, suffix: str, head: bytes) -> None:
    """Raise DataError where the content does not begin as that of the suffix does."""
    found = compression_of(head)
    if found == suffix or (suffix == ".zst" and head[1:4] == b"\x2a\x4d\x18"):  # a frame to skip, as pzstd writes
        return
    if found is not None:
        raise DataError(f"{file}: its name ends in {suffix}, but it is compressed as {found}. Rename it")
    known = what_it_is(head) or f"if it is not compressed, remove {suffix} from its name"
    raise DataError(f"{file}: damaged or truncated, or not compressed as its name says: {known}")
