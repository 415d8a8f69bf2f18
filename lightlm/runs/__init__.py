"""Run folders `runs/<name>/`: name, find, lock, list and remove them.

    runs/<name>/recipe.yaml metrics.jsonl machine.json checkpoints/ eval/ samples/ plots/ .lock

`lightlm.checkpoint` describes what a checkpoint holds.
"""

from lightlm.runs.folders import (
    MARKER,
    RECIPE,
    RUNS,
    checkpoints,
    claim_folder,
    discard_unstarted,
    find_run,
    mark_latest,
    new_run,
    remove_run,
    require_free,
    run_folder,
    run_names,
    run_of,
    step_name,
)
from lightlm.runs.lock import RunLockedError, holder, locked, require_unlocked

__all__ = [
    "MARKER",
    "RECIPE",
    "RUNS",
    "RunLockedError",
    "checkpoints",
    "claim_folder",
    "discard_unstarted",
    "find_run",
    "holder",
    "locked",
    "mark_latest",
    "new_run",
    "remove_run",
    "require_free",
    "require_unlocked",
    "run_folder",
    "run_names",
    "run_of",
    "step_name",
]
