"""SIGKILL at random moments. `LIGHTLM_KILLS=25 pytest tests/train/checkpointing/test_kills.py` kills more often."""

import os

import pytest

from tests.train.checkpointing.kills import Harness, differences

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor fork")

KILLS = int(os.environ.get("LIGHTLM_KILLS", "5"))
SEED = int(os.environ.get("LIGHTLM_KILL_SEED", "1"))
PER_RUN = 6  # kills that one run may suffer before it is let be


@pytest.mark.timeout(60 + 20 * KILLS)
def test_killed_runs_equal_an_uninterrupted_one(workspace, capsys):
    """Weights, optimizer, generator, metrics, samples and the very set of checkpoints, bit for bit."""
    harness = Harness(workspace, SEED)
    harness.complete("unkilled", 0)
    runs = 0
    while len(harness.landed) < KILLS:
        runs += 1
        # One run in three is made of processes of their own, which can die while Python starts, too.
        left = KILLS - len(harness.landed)
        harness.complete(f"killed-{runs}", min(left, PER_RUN), forked=bool(runs % 3 or KILLS <= PER_RUN))
        assert differences(workspace / f"runs/killed-{runs}", workspace / "runs/unkilled") == [], harness.landed
    assert len(harness.landed) >= KILLS
    with capsys.disabled():
        if "LIGHTLM_KILLS" in os.environ:
            print(
                f"\n{len(harness.landed)} kills of {runs} runs, seed {SEED}, 0 differences:",
                *harness.landed,
                sep="\n  ",
            )
