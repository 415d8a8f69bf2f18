"""Tasks of every kind in a user's folder, and the index of lm-eval's tasks."""

import json
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from lightlm.checkpoint import LoadedModel
from lightlm.errors import UsageError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import index as task_index
from lightlm.evaluate.tasks.manager import Tasks
from tests.evaluate.tiny_run import write_world

LOCAL = """
task: {name}
tag: {tag}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/quiz.jsonl, test: {folder}/quiz.jsonl}}
  cache_dir: {folder}/cache
training_split: train
test_split: test
doc_to_text: question
"""
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
READ = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "question",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}
GROUP = """
group: all_sums
task: [first, second]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task_index, "stock_tasks", dict)
    loaded = write_world(tmp_path, max_seq_len=200)
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    kinds = {"first": CHOICES, "deep/second": CHOICES, "written": WRITTEN, "read": READ}
    for place, values in kinds.items():
        name = Path(place).name
        tag = "my_sums" if values is CHOICES else f"my_{name}"
        text = LOCAL.format(name=name, tag=tag, folder=tmp_path.as_posix()).replace(
            *("doc_to_text: question", "") if "doc_to_text" in values else ("", "")
        )
        (tmp_path / "mine" / f"{place}.yaml").write_text(text + yaml.safe_dump(values))
    (tmp_path / "mine" / "group.yaml").write_text(GROUP)
    return loaded


def scores(loaded: LoadedModel, *tasks: str, **settings: int) -> dict:
    return run_tasks(LightLM(loaded), Tasks(Settings(list(tasks), include_path="mine", **settings))).results


def test_a_group_a_tag_and_a_glob_are_the_tasks_in_them(world: LoadedModel) -> None:
    group = scores(world, "all_sums")
    assert group["results"].keys() == {"all_sums", "first", "second"}
    assert group["group_subtasks"] == {"all_sums": ["first", "second"]}
    values = [group["results"][name]["acc,none"] for name in ("all_sums", "first", "second")]
    assert values[0] == pytest.approx((values[1] + values[2]) / 2)
    for name in ("my_sums", "[fs]*"):
        assert {"first", "second"} <= scores(world, name, limit=2)["results"].keys()


def test_each_kind_of_task_runs(world: LoadedModel) -> None:
    document = scores(world, "written", "read", "first", limit=3)
    assert document["results"]["written"].keys() >= {"exact_match,none"}
    assert document["results"]["read"]["bits_per_byte,none"] > 0
    assert {counts["effective"] for counts in document["n-samples"].values()} == {3}


def test_an_argument_that_datasets_no_longer_takes_is_dropped(world: LoadedModel) -> None:
    """Many stock tasks still have it, and lm-eval drops it too."""
    path = Path("mine/first.yaml")
    path.write_text(path.read_text().replace("dataset_kwargs:\n", "dataset_kwargs:\n  trust_remote_code: true\n"))
    [need] = Tasks(Settings(["first"], include_path="mine")).needs()
    assert need.options.keys() == {"data_files", "cache_dir"}


def test_examples_stand_in_the_prompt(world: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[str] = []
    score = LightLM.loglikelihood

    def spy(self: LightLM, requests: list, disable_tqdm: bool = True) -> list:
        contexts.extend(request.args[0] for request in requests)
        return score(self, requests, disable_tqdm)

    monkeypatch.setattr(LightLM, "loglikelihood", spy)
    documents = [json.loads(line) for line in Path("quiz.jsonl").read_text().splitlines()]
    answered = [f"{doc['question']}{doc['choices'][doc['gold']]}" for doc in documents]
    for count in (0, 2):
        contexts.clear()
        document = scores(world, "first", limit=2, num_fewshot=count)
        assert document["n-shot"]["first"] == count
        assert len(contexts) == 2 * 3
        for context in contexts:
            assert sum(text in context for text in answered) == count
            assert any(context.endswith(doc["question"]) for doc in documents)


def test_a_users_task_replaces_the_stock_one_with_a_warning(
    world: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = TaskManager(include_path="mine", include_defaults=False).task_index
    monkeypatch.setattr(task_index, "stock_tasks", lambda: {"first": stock["second"]})
    chosen = Tasks(Settings(["first"], include_path="mine"))
    assert chosen.task_index["first"].yaml_path == stock["first"].yaml_path
    assert "first replace lm-eval's tasks" in caplog.text


@pytest.mark.parametrize(
    ("text", "folder", "words"),
    [
        ("", "nowhere", "nowhere is not a folder"),
        ("", "runs", "runs is not a folder with lm-eval tasks"),
        ("task: [", "mine", "broken.yaml cannot be read"),
        ("include: gone.yaml\ntask: x", "mine", "gone.yaml"),
    ],
)
def test_a_folder_of_tasks_that_cannot_be_read(world: LoadedModel, text: str, folder: str, words: str) -> None:
    Path("runs/demo/recipe.yaml").unlink()
    if text:
        Path("mine/broken.yaml").write_text(text)
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        Tasks(Settings(["first"], include_path=folder))


def test_the_list_of_tasks_is_read_once_per_version_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stock"
    folder.mkdir()
    (folder / "a.yaml").write_text("task: a\ntag: [x, y]\n")
    (folder / "g.yaml").write_text("group: g\ntask: [a]\n")
    monkeypatch.setattr(task_index, "ROOT", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builds = []
    build = task_index.TaskIndex.build
    monkeypatch.setattr(task_index.TaskIndex, "build", lambda paths: builds.append(1) or build(paths))
    first, second = task_index.stock_tasks(), task_index.stock_tasks()
    assert first.keys() == second.keys() == {"a", "g", "x", "y"}
    for name in first:
        one, other = first[name], second[name]
        assert (one.name, one.kind, one.yaml_path, one.tags) == (other.name, other.kind, other.yaml_path, other.tags)
    assert len(builds) == 1
    [kept] = (tmp_path / "cache" / "lightlm").iterdir()
    (folder / "a.yaml").write_text("task: b\ntag: [x, z]\n")
    monkeypatch.setattr("lm_eval.__version__", "0")
    assert task_index.stock_tasks().keys() == {"b", "g", "x", "z"}
    assert len(builds) == 2
    for file in kept.parent.iterdir():
        file.write_text("[[torn")
    assert task_index.stock_tasks().keys() == {"b", "g", "x", "z"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a.yaml"))  # not a folder, and none can be made there
    assert task_index.stock_tasks().keys() == {"b", "g", "x", "z"}
