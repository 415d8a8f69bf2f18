"""`make gpu-check` works where there is no GPU to check, and keeps what it found when a section fails."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=250)


def test_sections_are_measured_and_written(tmp_path):
    done = run("--device", "cpu", "--tiny", "--only", "generation", "ddp", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = tmp_path.glob("gpu-check-*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["sections"]["generation"]["tokens_per_second_8"] > 0
    assert "| generation |" in file.with_suffix(".md").read_text(encoding="utf-8")


def test_the_limits_of_all_sections_fit_into_8_minutes():
    lines = run("--dry-run").stdout.splitlines()
    assert sum(int(line.split(": ")[1].removesuffix(" s")) for line in lines) < 480


def test_a_section_that_hangs_or_fails_costs_only_itself(monkeypatch):
    import argparse

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    options = argparse.Namespace(device="cpu", tiny=True)
    assert "longer than its limit" in gpu_check.run_section("generation", options, 0.01)["error"]
    options.device = "nosuch"
    assert "unknown device" in gpu_check.run_section("generation", options, 100)["error"]
