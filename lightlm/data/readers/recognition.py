"""What a file holds where it is not the text that its name promises, and what to do about it.

Signatures are only looked at where the content cannot be read, so no text is refused for how it begins.
"""

from lightlm.data.readers.file import File
from lightlm.errors import DataError
from lightlm.files import LFS_POINTER

HEAD_BYTES = 64 << 10  # as much as is looked at

# The first bytes of each compression, and the suffix of its files.
COMPRESSION_SIGNATURES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2"}

_EXTRACT = "extract it first"
_CONVERT = "extract its text first"
_SIGNATURES: dict[bytes, tuple[str, str]] = {
    **{start: (f"compressed ({name})", f"add {name} to its name") for start, name in COMPRESSION_SIGNATURES.items()},
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"PK\x03\x04": ("a zip archive, or a document such as .docx, .xlsx or .epub", _EXTRACT),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _EXTRACT),
    b"Rar!": ("a RAR archive", _EXTRACT),
    b"%PDF-": ("a PDF", _CONVERT),
    b"\xd0\xcf\x11\xe0": ("an old Microsoft Office document", _CONVERT),
    b"\x89PNG": ("a PNG image", ""),
    b"\xff\xd8\xff": ("a JPEG image", ""),
    b"GIF8": ("a GIF image", ""),
    b"\x7fELF": ("a program", ""),
    b"MZ": ("a program", ""),
    b"SQLite format 3\0": ("an SQLite database", "export its texts, for example as .csv"),
    b"ARROW1": ("an Arrow file", "write it as Parquet"),
    b"\x80\x04": ("a Python pickle", "write its texts as .jsonl"),
}  # fmt: skip

_MARKS: dict[bytes, str] = {  # the longer first: UTF-32's mark begins with that of UTF-16
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
    b"\xef\xbb\xbf": "utf-8",
}
_POINTER_BYTES = 1024  # the most of a Git LFS pointer, by its format


def byte_order_mark(head: bytes) -> tuple[str, int] | None:
    """Return the encoding that a byte-order mark at the start of a file names, and the mark's length in bytes."""
    return next(((name, len(mark)) for mark, name in _MARKS.items() if head.startswith(mark)), None)


def refuse_pointer(file: File, head: bytes) -> None:
    """Raise DataError where the file is the pointer that git leaves in place of a file in Git LFS."""
    if head.startswith(LFS_POINTER) and b"\noid " in head and len(head) < _POINTER_BYTES:
        raise DataError(
            f"{file}: a Git LFS pointer, not the file itself. Fetch the file in its repository: git lfs pull"
        )


def compression_of(head: bytes) -> str | None:
    """Return the suffix of the compression whose signature the bytes begin with."""
    return next((suffix for start, suffix in COMPRESSION_SIGNATURES.items() if head.startswith(start)), None)


def what_it_is(head: bytes) -> str | None:
    """Return what content is that cannot be read as text, and what to do; None where nothing is recognized."""
    for start, (what, advice) in _SIGNATURES.items():
        if head.startswith(start):
            return f"it is {what}, not text" + (f"; {advice}" if advice else "")
    if head[257:262] == b"ustar":
        return f"it is a tar archive, not text; {_EXTRACT}"
    if b"\0" in head:
        encoding = _encoding_of_nuls(head)
        if encoding is not None:
            return (
                f"it is {encoding} without a byte-order mark, not UTF-8. "
                f"Convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"
            )
    if head[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not data; download the file itself"
    return None


def _encoding_of_nuls(head: bytes) -> str | None:
    """Return the encoding of text whose every second byte, or three of four, is mostly NUL."""
    shares = [head[place::4].count(0) / max(1, len(head[place::4])) for place in range(4)]
    first, second, third, fourth = (share > 0.4 for share in shares)
    return {
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
    }.get((first, second, third, fourth))


def not_utf8(place: str, head: bytes, byte: int, at: str) -> DataError:
    """Return the error for a byte that is not UTF-8.

    Args:
        place: the file, and where in it a record is.
        head: bytes of the text, from its start or around the fault; they decide what is advised.
        at: where the byte is, for example "at offset 4".
    """
    known = what_it_is(head)
    if known is not None:
        return DataError(f"{place}: not UTF-8: {known}")
    return DataError(f"{place}: not UTF-8: byte 0x{byte:02x} {at}. {_encoding_advice(head)}")


def _encoding_advice(head: bytes) -> str:
    """Return how to convert text, as far as its bytes tell."""
    high = [byte for byte in head if byte >= 0x80]
    if b"\0" in head or sum(byte < 9 or 13 < byte < 27 for byte in head) > len(head) / 50:
        return "It holds binary data, not text"
    if _damaged_utf8(head):
        return "Most of it is UTF-8; drop the damaged characters: iconv -c -f UTF-8 -t UTF-8 FILE > NEW"
    if len(high) > len(head) / 4 and len(head) > 16:
        return "Find its encoding (file --mime-encoding FILE) and convert it: iconv -f ENCODING -t UTF-8 FILE > NEW"
    encoding = "CP1252" if any(byte < 0xA0 for byte in high) else "LATIN1"
    return f"If it is Western European, convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"


def _damaged_utf8(head: bytes) -> bool:
    """Return whether most characters beyond ASCII are UTF-8."""
    text = head.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    return sum(character > "\x7f" for character in text) - damaged > 2 * damaged


def holds_nul(place: str, head: bytes, at: str) -> DataError:
    """Return the error for a text with NUL characters; `head` begins the file, and `at` says where the first is."""
    known = what_it_is(head)
    return DataError(
        f"{place}: {known}"
        if known is not None
        else f"{place}: a NUL character{at}, so it is binary data, or "
        "damaged. If it is text, remove them: tr -d '\\000' < FILE > NEW"
    )
