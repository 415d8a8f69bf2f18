"""The two streams of the command line: progress and messages to standard error, results to standard output."""

import json
import os
from typing import Any

from rich.console import Console

# Of the processes that torchrun starts, the first speaks for all.
_silent = os.environ.get("RANK", "0") != "0"
console = Console(stderr=True, highlight=False, quiet=_silent)
out = Console(highlight=False, quiet=_silent)


def print_json(document: Any) -> None:
    """Print one JSON document and nothing else on standard output, as `--json` promises."""
    if not out.quiet:
        print(json.dumps(document, indent=2, ensure_ascii=False, default=str))
