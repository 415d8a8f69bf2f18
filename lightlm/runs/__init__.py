"""Run folders `runs/<name>/`: name, find, lock, list and remove them.

    runs/<name>/recipe.yaml metrics.jsonl machine.json checkpoints/ eval/ samples/ plots/
    .lock .overrides.json

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
    later_overrides,
    mark_latest,
    new_run,
    record_later_overrides,
    record_overrides,
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
    "later_overrides",
    "locked",
    "mark_latest",
    "new_run",
    "record_later_overrides",
    "record_overrides",
    "remove_run",
    "require_free",
    "require_unlocked",
    "run_folder",
    "run_names",
    "run_of",
    "step_name",
]
