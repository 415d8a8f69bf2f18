"""Python processes that LightLM starts: they import what this one imports, whatever lies in the working directory."""

import os
import sys
from collections.abc import Mapping


def python_command(*arguments: str) -> list[str]:
    """Return the command line of Python with arguments, which may begin with `-m` or `-c`.

    Python itself would search the working directory before all libraries, and take a user's statistics.py for its own.
    """
    return [sys.executable, "-P", *arguments]


def python_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which Python finds modules where this process does."""
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
