"""How OpenMP's threads wait. Imports no torch: it must act before torch starts."""

import os

THREADS_VARIABLE = "OMP_NUM_THREADS"
# Rounds that a thread of GNU's OpenMP, which torch's Linux packages bring, waits for work before it sleeps. Its own
# 300,000 take the core from whatever shares it (docs/decisions/fused-cpu-layers.md, "Threads").
_SPINS = 3_000


def bound_spinning() -> None:
    """Let waiting OpenMP threads sleep early, unless the user's environment says how they wait.

    Works only before torch is imported; child processes inherit it.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
