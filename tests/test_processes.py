"""Python processes that LightLM starts."""

import subprocess
from pathlib import Path

from lightlm.processes import python_command, python_environment

PACKAGE = Path(__file__).parents[1] / "lightlm"


def test_files_of_the_working_directory_do_not_replace_libraries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("statistics", "random", "lightlm"):
        Path(f"{name}.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    for arguments in (("-m", "lightlm", "--version"), ("-c", "import statistics, random, lightlm")):
        done = subprocess.run(python_command(*arguments), env=python_environment(), capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_modules_are_found_where_this_process_finds_them(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("print('mine')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = python_environment({"PYTHONPATH": "elsewhere"})
    assert subprocess.check_output(python_command("-m", "mine"), env=environment, text=True) == "mine\n"


def test_all_processes_are_started_so():
    found = [path.name for path in PACKAGE.rglob("*.py") if "sys.executable" in path.read_text(encoding="utf-8")]
    assert found == ["processes.py"]
