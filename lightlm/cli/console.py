"""The command line's streams: messages and progress go to standard error, results to standard output."""

import json
import os
from typing import Any

from rich.console import Console

# Of several processes, only the first prints.
_silent = os.environ.get("RANK", "0") != "0"
console = Console(stderr=True, highlight=False, quiet=_silent)
out = Console(highlight=False, quiet=_silent)


def print_json(document: Any) -> None:
    """Print the one JSON document that `--json` promises on standard output."""
    if not out.quiet:
        print(json.dumps(document, indent=2, ensure_ascii=False, default=str))
