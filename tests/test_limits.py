"""Control groups of version 1 and 2, as containers and batch systems set them."""

import os

import pytest

from lightlm import limits

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write files below /sys/fs/cgroup, and this process's groups."""
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def test_without_groups_the_affinity_counts(groups):
    groups("", {})
    assert limits.cores() == 64


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 64),
        ({"user.slice/me/cpu.max": "max 100000", "user.slice/cpu.max": "800000 100000"}, 8),
        ({"cpu.max": "damaged"}, 64),
    ],
)
def test_the_tightest_limit_of_version_2_counts(groups, files, cores):
    groups("0::/user.slice/me\n", files)
    assert limits.cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("300000", 3), ("-1", 64)])
def test_limits_of_version_1(groups, quota, cores):
    folder = "cpu,cpuacct/docker/abc"
    groups(
        "4:cpu,cpuacct:/docker/abc\n0::/\n",
        {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"},
    )
    assert limits.cores() == cores


@pytest.mark.parametrize(
    ("own", "files", "memory"),
    [
        ("", {}, 8 * GIB),
        ("0::/job\n", {"job/memory.max": str(GIB), "memory.max": str(2 * GIB)}, GIB),
        ("0::/job\n", {"job/memory.max": "max", "memory.max": str(2 * GIB)}, 2 * GIB),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(3 * GIB)}, 3 * GIB),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096)}, 8 * GIB),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has neither control groups nor sysconf")
def test_the_tightest_limit_of_memory_counts(groups, monkeypatch, own, files, memory):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    groups(own, files)
    assert limits.memory() == memory
