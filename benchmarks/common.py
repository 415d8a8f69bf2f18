"""Parts that all benchmarks share: options, and results as JSON. Imports only the standard library.

large_document.py and prepare_data.py measure whole processes, which must not load torch.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints a benchmark's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_json(result: Any, out: Path | None) -> None:
    """Write a result to the file `out`, if one was asked for."""
    if out is not None:
        out.write_text(json.dumps(result, indent=2, default=float) + "\n", encoding="utf-8")


def report(result: Any, out: Path | None) -> None:
    """Print a result as JSON and write it to the file `out`, if one was asked for."""
    print(json.dumps(result, indent=2, default=float))
    write_json(result, out)
