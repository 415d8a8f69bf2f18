"""The two streams of the command line: progress and messages to standard error, results to standard output."""

import json
from typing import Any

from rich.console import Console

console = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def print_json(document: Any) -> None:
    """Print one JSON document and nothing else on standard output, as `--json` promises."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))
