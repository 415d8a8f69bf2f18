import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from lightlm.cli.evaluate import evaluate
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.data.sources.hub import client as hub_client
from lightlm.errors import DataError, LightLMError, UsageError
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import index
from lightlm.evaluate.tasks.examples import scored_examples
from lightlm.evaluate.tasks.manager import Tasks
from tests.evaluate.quizzes import REPO, add_data, write_tasks
from tests.evaluate.tiny_run import write_world
from tests.hub import Fault, Hub
from tests.hub_data import use

app = typer.Typer()
app.command()(evaluate)
ALL = "quiz_easy,quiz_hard,quiz_written,quiz_prose"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the data of the tasks in `tasks/`, a run beside them, and empty caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index, "stock_tasks", dict)  # skips lm-eval's index: 5 s
    write_world(tmp_path)
    write_tasks(tmp_path / "tasks")
    hub_client._unreachable.cache_clear()
    with Hub() as server:
        use(server, tmp_path / "hub-cache", monkeypatch)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
        server.commit = add_data(server, tmp_path / "served")
        yield server
    hub_client._unreachable.cache_clear()


def down(hub: Hub, monkeypatch: pytest.MonkeyPatch, *, offline_set: bool) -> None:
    """Shut off the Hub; `offline_set` sets HF_HUB_OFFLINE=1, otherwise LightLM must notice."""
    hub.clear()
    hub_client._unreachable.cache_clear()
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(seconds) if seconds < 0.2 else pytest.fail("tried again"))
    if offline_set:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    else:
        for place in ("huggingface_hub.constants.ENDPOINT", "datasets.config.HF_ENDPOINT"):
            monkeypatch.setattr(place, "http://127.0.0.1:9")


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [*arguments, "--include-path", "tasks"])


def rows(done: Result) -> list[dict]:
    assert done.exception is None, done.exception
    return json.loads(done.stdout)["data_sets"]


def test_what_was_fetched_to_the_cache_is_enough_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    easy, hard, prose = rows(run("--prefetch", ALL, "--json"))
    assert (easy["data_set"], easy["config"], easy["tasks"]) == (REPO, "easy", ["quiz_easy", "quiz_written"])
    assert (easy["revision"], easy["files"], hard["tasks"]) == (hub.commit, 2, ["quiz_hard"])
    assert easy["bytes"] == sum(path.stat().st_size for path in Path("served/quiz/easy").iterdir())
    assert (prose["config"], prose["files"]) == (None, 1)
    assert Path(prose["where"]).is_relative_to(Path("datasets-cache").resolve())
    down(hub, monkeypatch, offline_set=True)
    done = run("--tasks", ALL, "--json")
    assert done.exception is None, done.exception
    [model] = json.loads(done.stdout)["models"]
    assert {row["task"] for row in model["results"]} == set(ALL.split(","))
    facts = json.loads(Path(model["file"]).with_suffix(".meta.json").read_text())
    assert facts["data_sets"][f"{REPO} (easy)"] == {"from": "hub", "revision": hub.commit}
    assert hub.requests == []


def test_a_folder_laid_out_like_the_hub_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    [easy] = rows(run("--prefetch", "quiz_easy", "--data-dir", "taken", "--json"))
    assert (easy["where"], easy["revision"], easy["files"]) == (str(Path("taken") / REPO), hub.commit, 2)
    assert Path("taken", REPO, "easy", "test.jsonl").read_bytes() == Path("served/quiz/easy/test.jsonl").read_bytes()
    assert not Path("taken", REPO, "hard").exists()  # though the Hub lists it first
    done = run("--prefetch", ALL, "--data-dir", "taken")  # the rest beside it
    assert done.exception is None, done.exception
    for word in (
        "Revision",
        hub.commit[:8],
        f"In {Path('taken/someone')}",
        f"{REPO} (easy)",
        "quiz_easy, quiz_written",
    ):
        assert word in done.stdout
    down(hub, monkeypatch, offline_set=False)
    shutil.rmtree("datasets-cache")
    shutil.rmtree("hub-cache")
    shutil.move("taken", "elsewhere")
    done = run("--tasks", ALL, "--data-dir", "elsewhere", "--json")
    assert done.exception is None, done.exception
    [model] = json.loads(done.stdout)["models"]
    document = json.loads(Path(model["file"]).read_text())
    assert document["configs"]["quiz_easy"]["dataset_path"] == REPO  # not where it lay
    facts = json.loads(Path(model["file"]).with_suffix(".meta.json").read_text())
    origin = {"from": str(Path("elsewhere") / REPO), "revision": hub.commit}
    assert facts["data_sets"][f"{REPO} (hard)"] == origin
    assert hub.requests == []
    monkeypatch.setenv("LIGHTLM_EVAL_DATA", "elsewhere")  # for training and --decontaminate, which lack the option
    examples = scored_examples(["tasks/quiz_easy.yaml"])["quiz_easy"]
    assert len(examples) == 6
    assert "The easy cat test 0 sat" in examples[0]


@pytest.mark.parametrize("offline_set", [True, False])
def test_all_that_is_missing_is_named_before_the_model_loads(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, offline_set: bool
) -> None:
    rows(run("--prefetch", "quiz_prose", "--json"))
    down(hub, monkeypatch, offline_set=offline_set)
    monkeypatch.setattr("lightlm.convert.load.load_pretrained", lambda *_: pytest.fail("the model was loaded"))
    done = run("--tasks", "quizzes,quiz_written,quiz_prose")
    assert isinstance(done.exception, DataError)
    message = str(done.exception)
    assert "2 data sets cannot be read" in message
    assert ("HF_HUB_OFFLINE is set" if offline_set else "no answer from http://127.0.0.1:9") in message.splitlines()[1]
    assert f"{REPO} (easy)  for quiz_easy, quiz_written" in message
    assert f"{REPO} (hard)  for quiz_hard" in message
    assert "someone/prose" not in message
    command = "  lightlm eval --prefetch quizzes,quiz_written,quiz_prose --include-path tasks"
    assert {command, f"{command} --data-dir DIR"} <= set(message.splitlines())


def test_what_the_hub_does_not_have_is_listed_and_the_rest_fetched(hub: Hub) -> None:
    text = Path("tasks/prose.yaml").read_text(encoding="utf-8")
    for name in ("gone", "lost"):
        changed = text.replace("someone/prose", f"nobody/{name}").replace("quiz_prose", f"quiz_{name}")
        Path(f"tasks/{name}.yaml").write_text(changed, encoding="utf-8")
    done = run("--prefetch", "quiz_gone,quiz_easy,quiz_lost", "--data-dir", "taken")
    assert isinstance(done.exception, LightLMError)
    message = str(done.exception)
    assert message.startswith("2 of 3 data sets")
    for word in ("nobody/gone, for quiz_gone: ", "nobody/lost, for quiz_lost: "):
        assert word in message
    assert Path("taken", REPO, "easy", "test.jsonl").is_file()


@pytest.mark.parametrize("folder", [[], ["--data-dir", "taken"]])
def test_a_connection_that_breaks_is_tried_again_and_nothing_is_fetched_twice(hub: Hub, folder: list[str]) -> None:
    files = r"resolve/.*/easy/test\.jsonl"
    hub.faults += [Fault("drop", f"GET .*{files}"), Fault("status", r"GET /api/datasets", status=503)]
    [first] = rows(run("--prefetch", "quiz_easy", *folder, "--json"))
    assert not [fault for fault in hub.faults if fault.times]
    hub.clear()
    assert rows(run("--prefetch", "quiz_easy", *folder, "--json")) == [first]
    assert hub.body_bytes(files) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo"], "leave out MODEL"),
        (["--tasks", "quiz_easy", "--limit", "3"], "leave out --tasks, --limit"),
        (["--data-dir", "runs/demo/recipe.yaml"], "is a file"),
    ],
)
def test_fetching_refuses_options_without_effect(hub: Hub, arguments: list[str], words: str) -> None:
    done = run(*arguments, "--prefetch", "quiz_easy")
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)
    assert hub.requests == []


def test_fetching_without_the_hub_is_one_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    down(hub, monkeypatch, offline_set=False)
    done = run("--prefetch", "quiz_easy")
    assert isinstance(done.exception, DataError)
    assert "127.0.0.1:9 cannot be reached" in str(done.exception)
    done = run("--prefetch", "heldout")
    assert done.exception is None
    assert "no data set" in done.stdout


def test_a_folder_comes_before_what_the_cache_holds(hub: Hub) -> None:
    rows(run("--prefetch", "quiz_prose", "--json"))
    Path("mine/someone/prose").mkdir(parents=True)
    Path("mine/someone/prose/train.jsonl").write_text('{"text": "Mine."}\n')
    chosen = Tasks(Settings(["quiz_prose"], include_path="tasks", data_dir="mine"))
    [document] = chosen.load(["quiz_prose"])["tasks"]["quiz_prose"].eval_docs
    assert document["text"] == "Mine."


def test_a_folder_of_that_name_is_left_where_it_is(hub: Hub) -> None:
    shutil.copytree("served/prose", "someone/prose")
    [row] = rows(run("--prefetch", "quiz_prose", "--data-dir", "taken", "--json"))
    assert (row["where"], row["files"], row["revision"]) == (str(Path("someone/prose").resolve()), 1, None)
    assert hub.requests == []


def test_a_model_of_the_hub_and_one_of_a_run_side_by_side(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightlm.checkpoint import load_model

    export_huggingface(load_model(Path("runs/demo/checkpoints/step_000007")), Path("exported"))
    commit = hub.add("someone/tiny", Path("exported"), kind="models")
    done = run("someone/tiny", "demo", "exported", "--tasks", "quizzes", "--out", "scores", "--json")
    assert done.exception is None, done.exception
    models = json.loads(done.stdout)["models"]
    assert [model["model"] for model in models] == ["tiny", "demo/step_000007", "exported"]
    assert models[0]["results"] == models[1]["results"] == models[2]["results"]
    theirs, ours, again = (json.loads(Path(m["file"]).with_suffix(".meta.json").read_text()) for m in models)
    assert (theirs["revision"], ours["revision"]) == (commit, None)
    assert theirs["weights"] == again["weights"]
    assert ours["weights"].keys() == {"model.safetensors"}
