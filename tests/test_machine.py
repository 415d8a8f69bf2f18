import subprocess
from pathlib import Path

import pytest
import torch

from lightlm import machine


def test_a_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert machine.git_commit(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    (tmp_path / "deep").mkdir()
    commit = machine.git_commit(tmp_path / "deep")
    assert commit
    assert git("rev-parse", "HEAD").startswith(commit)
    (tmp_path / "file").write_text("2")
    assert machine.git_commit(tmp_path) == f"{commit}+"


def test_the_machine_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.describe_machine(torch.device("cpu"))
    assert facts["processor"]
    assert facts["cpu_features"]
    assert facts["processors"] >= 1
    assert facts["memory_gib"] > 0.1
    assert "accelerator" not in facts
    properties = type("Properties", (), {"name": "NVIDIA H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    facts = machine.describe_machine(torch.device("cuda", 1))
    assert (facts["accelerator"], facts["accelerator_memory_gib"]) == ("NVIDIA H100", 80.0)


def test_processors_of_one_name_differ_in_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: "fpu sse4_2 fma avx2 avx512f amx_tile")
    assert machine.cpu_features() == "avx2 fma avx512f"
    monkeypatch.setattr(machine, "cpu_flags", lambda: "")  # not Linux
    assert machine.cpu_features() == torch.backends.cpu.get_cpu_capability().lower()


def test_a_runs_record_is_read_back_whatever_version_wrote_it(tmp_path: Path) -> None:
    assert machine.read_machine(tmp_path) == {}
    machine.record_machine(tmp_path, torch.device("cpu"), {"dtype": "float32", "processes": 2, "tokens": 9})
    found = machine.read_machine(tmp_path)
    assert (found["dtype"], found["processes"], found["torch"]) == ("float32", 2, torch.__version__)
    assert found.keys() >= {"system", "processor", "processors", "python", "lightlm", "commit"}
    assert "tokens" not in found
    (tmp_path / "machine.json").write_text('{"device": "H100", "python": "3.11"}')  # without most keys
    assert machine.read_machine(tmp_path) == {"device": "H100", "python": "3.11"}
    (tmp_path / "machine.json").write_text("[")
    assert machine.read_machine(tmp_path) == {}


def test_a_run_that_moves_keeps_the_record_of_its_steps_on_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(first_step: int, processor: str) -> list[tuple[int, str]]:
        """The steps and processors on record after a process has begun after `first_step`."""
        monkeypatch.setattr(machine, "processor", lambda: processor)
        moved = machine.record_machine(tmp_path, torch.device("cpu"), {"first_step": first_step})
        notes.append(moved)
        found = machine.read_machine(tmp_path)
        return [(part["after_step"], part["processor"]) for part in (*found.pop("earlier", []), found)]

    notes: list[bool] = []
    assert record(0, "old") == [(0, "old")]
    assert record(10, "old") == [(0, "old")]
    assert record(20, "new") == [(0, "old"), (20, "new")]
    assert record(30, "new") == [(0, "old"), (20, "new")]
    assert record(20, "third") == [(0, "old"), (20, "third")]  # killed before a checkpoint: no step of "new" is left
    assert record(40, "old") == [(0, "old"), (20, "third"), (40, "old")]
    assert record(0, "old") == [(0, "old")]
    assert notes == [False, False, True, False, True, True, False]


def test_versions_of_what_is_not_installed_are_null() -> None:
    found = machine.versions("lm_eval", "no-such-package-anywhere")
    assert found["lm_eval"]
    assert found["no-such-package-anywhere"] is None
    assert found["torch"] == torch.__version__
