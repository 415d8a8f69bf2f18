"""How LightLM's processes start: what they import, and how OpenMP's threads wait in them. Imports no torch."""

import os
import sys
from collections.abc import Mapping

THREADS_VARIABLE = "OMP_NUM_THREADS"
# Rounds that a thread of GNU's OpenMP, which torch's Linux packages bring, waits for work before it sleeps. Its own
# 300,000 take the core from whatever shares it (docs/decisions/fused-cpu-layers.md, "Threads").
_SPINS = 3_000


def python_command(*arguments: str) -> list[str]:
    """Return the command line of Python with arguments, which may begin with `-m` or `-c`.

    Python itself would search the working directory before all libraries, and take a user's statistics.py for its own.
    """
    return [sys.executable, "-P", *arguments]


def python_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which Python finds modules where this process does."""
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def bound_spinning() -> None:
    """Let waiting OpenMP threads sleep early, unless the user's environment says how they wait.

    Works only before torch is imported; the processes that are started inherit it.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
