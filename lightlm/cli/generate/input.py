"""Where prompts of `lightlm generate` come from: an argument, a file, standard input, or a person who types."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lightlm.cli.console import console
from lightlm.errors import LightLMError, UsageError

BLOCK = '"""'  # before the first and after the last line of a text of several lines
NO_CONVERSATION = "--system is the first message of a conversation; add --chat"
_HISTORY_LINES = 1000


def read_prompt(argument: str | None, file: Path | None) -> str:
    """Return the prompt that the command line names. Its last line break, which an editor or shell adds, is dropped.

    Raises:
        LightLMError: the file cannot be read.
        UsageError: the prompt is not UTF-8.
    """
    if file is not None:
        try:
            text = decoded(file.read_bytes())
        except OSError as error:
            raise LightLMError(f"--prompt-file {file} cannot be read: {error.strerror}") from None
        return checked(text.removesuffix("\n"), f"--prompt-file {file}", "save it as UTF-8")
    if argument == "-":
        if sys.stdin.isatty():
            console.print("[dim]Type the prompt; Ctrl-D ends it (on Windows Ctrl-Z and Enter).[/]")
        text = decoded(sys.stdin.buffer.read())
        return checked(text.removesuffix("\n"), "standard input", "convert it to UTF-8")
    assert argument is not None
    return checked(argument)


def decoded(content: bytes) -> str:
    """Return UTF-8 as text with plain line breaks; bytes that are not UTF-8 become lone surrogates, see `checked`."""
    return content.decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n")


def checked(text: str, what: str = "the prompt", advice: str = "type it again, or set a UTF-8 locale") -> str:
    """Return a text from the command line or a file, which is UTF-8 whatever the locale.

    Raises:
        UsageError: it is not UTF-8. Python keeps bytes that are not of the locale's encoding as lone surrogates.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        place = len(error.object[: error.start].decode()) + 1
        raise UsageError(f"{what} is not valid UTF-8 at character {place}; {advice}") from None


def stop_text(text: str) -> str:
    """Return a stop string as it is typed: \\n is a line break."""
    return text.replace("\\n", "\n")


class Entries:
    """What a person types, entry by entry, or the lines of a pipe.

    An entry is a line. After a backslash at its end it continues in the next line, and one that begins with `\"\"\"`
    ends with them. The end of the input ends an entry, too. On a terminal with Python's readline, lines can be edited
    and recalled, also those of earlier sessions.
    """

    def __init__(self) -> None:
        # Python's `input` edits lines only if both ends are the terminal; with another output it would write into that.
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def next(self) -> str:
        """Return the next entry.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: Ctrl-C was pressed; what was typed is dropped.
            UsageError: the entry is not UTF-8.
        """
        line = self._line("> ")
        if line.startswith(BLOCK):
            lines = [line.removeprefix(BLOCK)]
            with contextlib.suppress(EOFError):
                while not lines[-1].endswith(BLOCK):
                    lines.append(self._line(". "))
            return checked("\n".join(lines).removesuffix(BLOCK))
        with contextlib.suppress(EOFError):
            while line.endswith("\\"):
                line = line[:-1] + "\n"
                line += self._line(". ")
        return checked(line)

    def _line(self, prompt: str) -> str:
        if self.terminal:
            return input(prompt)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decoded(line).removesuffix("\n")


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Context manager in which lines typed at a terminal are edited and kept for the next session, if possible."""
    try:
        import readline

        path = history_file()
    except (ImportError, RuntimeError):  # Windows, whose console edits and recalls lines; a user without a home folder
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def history_file() -> Path:
    """Return the file of the lines typed in earlier sessions, which only its owner may read."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "lightlm" / "history"
