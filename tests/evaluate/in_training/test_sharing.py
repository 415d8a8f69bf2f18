"""`eval.tasks` shared by the processes of a run: same figures as one process, and no process waits in vain."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightlm import checkpoint
from lightlm.checkpoint import LoadedModel
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.in_training import sharing
from lightlm.evaluate.in_training import task_scores as during_training
from lightlm.evaluate.in_training.sharing import Exchange, PeerFailedError, SharedLightLM
from lightlm.evaluate.in_training.task_scores import TaskScores
from lightlm.evaluate.results.rows import rows
from lightlm.evaluate.results.truncation import Truncation
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import manager
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.recipe import EvalSection, load_recipe
from lightlm.train.distributed import World
from tests.corpus import TINY_RECIPE
from tests.evaluate.tasks.test_cloze import documents
from tests.evaluate.tiny_run import write_quiz, write_world
from tests.train.group import together
from tests.train.watch import Recorder, make_trainer

LIMIT = 20
RECIPE = (
    "model.max_seq_len=128",
    "train.batch_tokens=1024",
    "train.tokens=4096",
    "eval.prompts=[]",
    f"eval.limit={LIMIT}",
)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60)))
    prepare(str(source), "train:320", Path("data/tiny"), val_fraction=0.5)
    Path("tiny.yaml").write_text(TINY_RECIPE)
    return tmp_path


def run_and_quarrel(world):
    """Return the metrics of a sharded run with `eval.tasks`, and the outcome of each kind of trouble in process 1."""
    recipe = load_recipe("tiny.yaml", (*RECIPE, "eval.tasks=[heldout]", "train.parallel=fsdp"))
    watch = Recorder()
    data = DataFolder.open(Path("data/tiny"))
    scores = TaskScores(recipe.eval, data, data.tokenizer, world, watch.note)

    trainer = make_trainer(recipe, "shared", watch, world=world, evaluator=scores)
    trainer.train()
    model, second = trainer.loss.whole_model(), world.rank == 1

    def outcome(scores, stop=None):
        try:
            return scores(model, Path("here"), stop or threading.Event())
        except Exception as error:
            return str(error)

    troubles = []
    stop = threading.Event()
    if second:
        stop.set()
    troubles.append(outcome(scores, stop))
    limit = recipe.eval.model_copy(update={"limit": LIMIT + second})
    troubles.append(outcome(TaskScores(limit, data, data.tokenizer, world, watch.note)))
    if second:
        plain, SharedLightLM._loglikelihood_tokens = SharedLightLM._loglikelihood_tokens, fail
    troubles.append(outcome(scores))
    if second:
        SharedLightLM._loglikelihood_tokens = plain
        during_training.run_tasks = lambda *args, **options: fail(run_tasks(*args, **options))  # with all answers there
    troubles.append(outcome(scores))
    world.barrier()  # all are still in step
    return watch.metrics, watch.notes, troubles


def fail(*_, **__):
    raise MemoryError("no room")


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes the Linux way")
def test_two_processes_score_as_one_and_share_trouble(workspace):
    (metrics, notes, troubles), (_, _, others) = together(2, run_and_quarrel)
    cut, without_one = notes
    assert "heldout_cloze: the beginning of" in cut  # once, though there were several evaluations
    assert without_one == "eval.tasks at here: the task heldout_cloze cannot be scored: process 1 of 2: no room"
    shared = {key.removeprefix("eval/"): value for key, value in metrics[-1].items() if key.startswith("eval/")}
    path = checkpoint.newest_checkpoint(Path("runs/shared"))
    loaded = checkpoint.load_model(path, torch.device("cpu"))
    single = rows(run_tasks(LightLM(loaded), Tasks(Settings(["heldout"], LIMIT, data="data/tiny"))).results)
    assert {f"{row.task}/{row.metric}" for row in single} == shared.keys()
    for row in single:
        exact = row.task == "heldout_cloze"
        value = shared[f"{row.task}/{row.metric}"]
        assert value == row.value if exact else value == pytest.approx(row.value, rel=1e-6)
    stopped, different, failed, late = troubles
    assert stopped is None
    assert others[0] is None
    assert "different examples" in different
    assert "different examples" in others[1]
    assert failed == others[2]  # what the other task gave
    assert failed.keys() == {"heldout/bits_per_byte", "heldout/byte_perplexity"}
    assert (late, others[3]) == ("process 1 of 2: no room", "no room")


def test_rounds_change_no_figure_and_a_signal_ends_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manager, "_OURS", {"heldout", "quiz.yaml"})  # skips lm-eval's index: 5 s
    loaded = write_world(tmp_path)
    write_quiz(tmp_path)
    monkeypatch.setattr(sharing, "_FIRST_ROUND", 1.0)
    monkeypatch.setattr(sharing, "_ROUND_SECONDS", 0.0)
    tasks, stop = Tasks(Settings(["heldout", "quiz.yaml"])), threading.Event()
    shared = rows(run_tasks(SharedLightLM(loaded, Exchange(World(), stop)), tasks, bootstrap_iters=0).results)
    for ours, other in zip(shared, rows(run_tasks(LightLM(loaded), tasks).results), strict=True):
        assert (ours.task, ours.metric, ours.documents) == (other.task, other.metric, other.documents)
        assert ours.value == pytest.approx(other.value, rel=1e-6)

    answered = []

    class Counting(SharedLightLM):
        def _loglikelihood_tokens(self, requests, **kwargs):
            answered.extend(requests)
            stop.set()
            return super()._loglikelihood_tokens(requests, **kwargs)

    monkeypatch.setattr(during_training, "SharedLightLM", Counting)
    section = EvalSection(tasks=["quiz.yaml"])
    data = DataFolder.open(Path("data/tiny"))
    scores = TaskScores(section, data, data.tokenizer, World(), print)
    assert scores(loaded.model, loaded.path, stop) is None
    assert len(answered) == 3  # one question of six


def test_a_failure_of_the_first_process_is_reported_as_it_is():
    class Two:
        rank, size = 1, 2

        def gather(self, value):
            return [type(value)("failure", failure="no room"), value]

    with pytest.raises(PeerFailedError, match="process 0 of 2: no room"):
        Exchange(Two(), threading.Event()).round("loglikelihood 0", None)


def test_generated_answers_are_shared_too(tmp_path, monkeypatch):
    class Two:
        rank, size = 0, 2

        def gather(self, value):
            other = type(value)(value.position, ({1: "b", 3: "d"}, 0.1, Truncation(2, 1, 5, 5)))
            return [value, other]

    loaded = write_world(tmp_path)
    monkeypatch.setattr(
        LightLM, "generate_until", lambda self, requests: [request.args[0].lower() for request in requests]
    )
    lm = SharedLightLM(LoadedModel(loaded.model, loaded.tokenizer, loaded.path), Exchange(Two(), threading.Event()))
    requests = [type("Request", (), {"args": (text, {"until": ["."]})})() for text in "ABCD"]
    assert lm.generate_until(requests) == ["a", "b", "c", "d"]
    assert lm.truncation == Truncation(2, 1, 5, 5)  # of the other process
