"""Parts that all benchmarks share: options, and results as JSON. Does not load torch.

large_document.py and prepare_data.py measure whole processes, which must be small.
"""

import argparse
import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightlm.cli.console import guard_streams, lost_output
from lightlm.files import write_text


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints a benchmark's docstring as it is written.

    From then on a reader of the output that leaves (`| head`) ends no benchmark.
    """
    guard_streams()
    atexit.register(_fail_without_output)
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def _fail_without_output() -> None:
    if error := lost_output():  # such as a full disk
        print(f"Error: the output could not be written ({error.strerror})", file=sys.stderr, flush=True)
        os._exit(1)


def write_json(result: Any, out: Path | None) -> None:
    """Replace the file `out` by a result, if one was asked for; a kill or a full disk leaves the old one."""
    if out is not None:
        write_text(out, json.dumps(result, indent=2, default=float) + "\n")


def report(result: Any, out: Path | None) -> None:
    """Print a result as JSON and write it to the file `out`, if one was asked for."""
    write_json(result, out)
    print(json.dumps(result, indent=2, default=float))
