"""Names that people type: the nearest known one, and what happens if a file here has a known name.

One rule holds for recipes, sources, tokenizers and models: a known name means what LightLM knows by it, and a note says
so if a file or folder here is called the same. `./NAME` always means the file or folder.
"""

import difflib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

warn = logging.getLogger("lightlm").warning  # to standard error, unless a program says otherwise


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelled one most likely means, or None if none resembles it.

    One that contains the other counts (`heads` and `num_heads`), or at least 70% of their letters in the same order:
    at the 60% that difflib takes by default, `dropout` means `router`.
    """
    candidates = list(known)
    if close := difflib.get_close_matches(name, candidates, n=1, cutoff=0.7):
        return close[0]
    words = [other for other in candidates if len(name) > 3 and (f"_{name}_" in f"_{other}_" or other in name)]
    return min(words, key=len, default=None)


def note_clash(name: str, meaning: str, here: Iterable[Path], note: Callable[[str], None] = warn) -> None:
    """Say that `name` means `meaning`, if one of the paths `here` exists and might be meant too."""
    if found := next((path for path in here if path.exists()), None):
        kind = "folder" if found.is_dir() else "file"
        note(f"{name} means {meaning}. There is also a {kind} of that name here: write ./{found.as_posix()} to use it")
