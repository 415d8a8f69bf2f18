import json

import pytest

from tests.corpus import make_workspace
from tests.report.run_folder import rows, write_run


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_training_ends_with_a_page_and_report_makes_it_again(lightlm, tmp_path):
    make_workspace(tmp_path, 100)
    outcome = lightlm("train", "tiny.yaml", "train.tokens=512")
    page = tmp_path / "runs/tiny/report.html"
    assert "Plots and page: runs/tiny/report.html" in outcome.stdout.replace("\\", "/")
    assert "cpu (" in page.read_text(encoding="utf-8")  # the device, from machine.json
    machine = json.loads((tmp_path / "runs/tiny/machine.json").read_text(encoding="utf-8"))
    assert {key: machine[key] for key in ("processes", "accumulation", "compile")} == {
        "processes": 1,
        "accumulation": 4,
        "compile": False,
    }
    assert (tmp_path / "runs/tiny/plots/loss.png").is_file()

    page.unlink()
    document = json.loads(lightlm("report", "--json").stdout)
    assert document["page"].replace("\\", "/") == "runs/tiny/report.html"
    assert page.is_file()
    assert document["runs"][0]["tokens"] == 512
    assert document["runs"][0]["device"].startswith("cpu")
    assert all((tmp_path / path).is_file() for path in document["plots"].values())


def test_a_failure_to_draw_is_a_note_and_not_the_end_of_the_run(lightlm, tmp_path, monkeypatch):
    make_workspace(tmp_path, 100)

    def broken(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr("lightlm.report.build.draw_plots", broken)
    outcome = lightlm("train", "tiny.yaml", "train.tokens=256", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["report"] is None
    assert "no plots were made (no font)" in outcome.stderr


def test_several_runs_by_name_become_a_comparison(lightlm, tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, rows(3))
    outcome = lightlm("report", "a", "runs/b")
    assert (tmp_path / "runs/compare-a-b/report.html").is_file()
    assert "compare-a-b" in outcome.stdout
    names = [line.split()[0] for line in outcome.stdout.splitlines() if "28.8K" in line]
    assert names == ["a", "b"]


def test_out_names_the_folder(lightlm, tmp_path):
    run = write_run(tmp_path / "runs/a", rows(2))
    lightlm("report", "a", "--out", "elsewhere/here")
    assert (tmp_path / "elsewhere/here/plots/loss.png").is_file()
    assert not (run / "report.html").exists()
    lightlm("report", "a", "--out", "elsewhere/here").assert_one_message("report.html exists already", "--overwrite")
    assert lightlm("report", "a", "--out", "elsewhere/here", "--overwrite").code == 0


def test_mistakes_are_one_message(lightlm, tmp_path):
    lightlm("report").assert_one_message("no run yet")
    write_run(tmp_path / "runs/a", [])
    lightlm("report", "a").assert_one_message("nothing to plot")
    lightlm("report", "nope").assert_one_message("no run at nope", "runs here: a")
    lightlm("report", "a", "runs/a").assert_one_message("named twice")
