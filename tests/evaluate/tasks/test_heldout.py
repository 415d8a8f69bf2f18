import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from lightlm.checkpoint import LoadedModel
from lightlm.data.folder import DataFolder
from lightlm.data.sources.hub import client as hub
from lightlm.errors import DataError, UsageError
from lightlm.evaluate.__main__ import with_defaults
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results import store
from lightlm.evaluate.results.rows import rows
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import manager
from lightlm.evaluate.tasks.heldout import dataset_of
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.references import TASKS
from lightlm.recipe import load_recipe
from lightlm.train.distributed import World
from lightlm.train.step.parallel import ParallelLoss
from lightlm.train.validation import validate
from tests.corpus import texts
from tests.evaluate.tiny_run import DOCUMENTS, write_data, write_world

# As if transformers were not installed, for all who import it and all who ask whether it could be.
WITHOUT_TRANSFORMERS = """
import runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "transformers" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
runpy.run_module("lightlm.evaluate", run_name="__main__")
assert "transformers" not in sys.modules
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manager, "_OURS", {"heldout", "quiz.yaml", "far.yaml"})  # skips lm-eval's index: 5 s
    return write_world(tmp_path)


@torch.no_grad()
def bits_per_byte(loaded: LoadedModel, texts: list[str]) -> float:
    nats = 0.0
    for text in texts:
        ids = [loaded.tokenizer.end_of_text_id, *loaded.tokenizer.encode(text)]
        for position in range(1, len(ids)):
            # Every token but the first windows' sees at least this much; windows only matter past max_seq_len.
            inputs = torch.tensor([ids[:position][-loaded.model.config.max_seq_len :]])
            nats -= float(loaded.model(inputs)[0, -1].double().log_softmax(-1)[ids[position]])
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_heldout_is_bits_per_byte_on_the_runs_own_validation_documents(world: LoadedModel) -> None:
    document = run_tasks(LightLM(world), Tasks(Settings(["heldout"], limit=1))).results
    figures = {row.metric: row for row in rows(document)}
    expected = bits_per_byte(world, DOCUMENTS[:1])
    assert figures["bits_per_byte"].value == pytest.approx(expected, rel=1e-5)
    assert figures["byte_perplexity"].value == pytest.approx(2**expected, rel=1e-5)
    assert figures["bits_per_byte"].documents == 1
    full = rows(run_tasks(LightLM(world), Tasks(Settings(["heldout"]))).results)
    assert full[0].documents == len(DOCUMENTS)


def test_heldout_equals_the_bits_per_byte_of_training(world: LoadedModel) -> None:
    """Each document fills a window, so that both predict the same tokens from the same context."""
    length = world.model.config.max_seq_len - 1  # and an end-of-text token
    candidates = (text[:size] for text in texts(60) for size in range(len(text)))
    documents = [text for text in candidates if len(world.tokenizer.encode(text)) == length][:20]
    assert len(documents) == 20
    write_data(Path("data/windows"), world.tokenizer, documents)
    folder = DataFolder.open(Path("data/windows"))
    loss = ParallelLoss(world.model, World(), load_recipe("demo"), torch.device("cpu"), torch.float32)
    losses = validate(
        loss,
        {"windows": folder.split("val")},
        {"windows": 1.0},
        torch.from_numpy(world.tokenizer.token_bytes()),
        seq_len=length + 1,
        max_tokens=1_000_000,
        batch_size=3,
        stopped=lambda: False,
        finished=lambda share: None,
    )
    assert losses is not None
    scores = rows(run_tasks(LightLM(world), Tasks(Settings(["heldout"], data="data/windows"))).results)
    scored = next(row for row in scores if row.metric == "bits_per_byte")
    assert scored.documents == 20
    assert losses["val_bpb"] == pytest.approx(scored.value, rel=1e-6)
    assert scored.value == pytest.approx(bits_per_byte(world, documents), rel=1e-5)


def test_heldout_without_a_run_needs_a_data_folder(world: LoadedModel) -> None:
    stranger = LightLM(LoadedModel(world.model, world.tokenizer, Path("some/model")))
    with pytest.raises(DataError, match="--data"):
        run_tasks(stranger, Tasks(Settings(["heldout"])))
    with pytest.raises(DataError, match="nowhere"):
        run_tasks(stranger, Tasks(Settings(["heldout"], data="nowhere")))
    assert rows(run_tasks(stranger, Tasks(Settings(["heldout"], data="tiny"))).results)


@pytest.mark.parametrize("recipe", [b"a: [", b"\xff", b"- a", b"", b"data: x", b"data: {dataset: 5}"])
def test_a_damaged_recipe_is_named(world: LoadedModel, recipe: bytes) -> None:
    Path("runs/demo/recipe.yaml").write_bytes(recipe)
    with pytest.raises(DataError, match=r"recipe\.yaml.*--data"):
        dataset_of(world.path)


def test_options_of_lm_evals_command_are_not_overridden() -> None:
    assert with_defaults(["run", "--device=cpu", "--include_path=x"]) == ["run", "--device=cpu", "--include_path=x"]
    assert with_defaults(["run", "--device", "cpu"]) == ["run", "--device", "cpu", "--include_path", str(TASKS)]
    assert with_defaults(["ls", "tasks"]) == ["ls", "tasks"]


def test_an_unknown_task_is_named_with_its_nearest() -> None:
    with pytest.raises(UsageError, match=r"'helaswag'.*hellaswag"):
        Tasks(Settings(["heldout", "helaswag"]))


def test_a_data_set_out_of_reach_is_named_with_the_way_out(world: LoadedModel) -> None:
    path = Path("far.yaml")
    path.write_text(Path("quiz.yaml").read_text().replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(DataError, match=r"(?s)nobody/nothing.*HF_HUB_OFFLINE"):
        run_tasks(LightLM(world), Tasks(Settings(["far.yaml"])))


def test_an_unreachable_hub_is_not_retried(world: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hub._unreachable.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    path = Path("far.yaml")
    path.write_text(Path("quiz.yaml").read_text().replace("dataset_path: json", "dataset_path: nobody/nothing"))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s to try again"))
    with pytest.raises(DataError, match=r"(?s)nobody/nothing.*no answer from http://127\.0\.0\.1:9.*HF_HUB_OFFLINE"):
        Tasks(Settings(["quiz.yaml", "far.yaml"])).load(["far.yaml"])
    assert not datasets.config.HF_HUB_OFFLINE
    assert run_tasks(LightLM(world), Tasks(Settings(["quiz.yaml"]))).results["results"]  # local data need no Hub


def test_folders_of_one_name_have_results_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["books", "data/books", "data/../old/books", str(tmp_path / "old" / "books"), "new/books", "./books"]
    settings = [Settings(["heldout"], data=place) for place in places]
    stems = [store.file_stem(one) for one in settings]
    assert stems[0] == stems[1] == "heldout_books"
    assert stems[2] == stems[3]
    Path("data").mkdir()
    Path("data/linked").symlink_to(tmp_path / "old", target_is_directory=True)
    assert store.file_stem(Settings(["heldout"], data="linked")) == "heldout_linked"
    assert len(set(stems)) == len({one.chosen for one in settings}) == 4
    assert store.file_stem(Settings(["own"], include_path="t")) == "own_t"
    own = {store.file_stem(Settings(["own"], include_path=place)) for place in ("t", "a/t", "b/t")}
    assert len(own) == 3


def test_results_are_lm_evals_own_document_beside_a_file_of_facts(world: LoadedModel, tmp_path: Path) -> None:
    settings = Settings(["quiz.yaml"], num_fewshot=0, limit=4)
    tasks = Tasks(settings)
    document = run_tasks(LightLM(world), tasks).results
    path = store.result_file(world, settings, None)
    assert path == tmp_path / "runs" / "demo" / "eval" / "step_000007_quiz_0shot_limit4.json"
    facts = store.provenance(world, store.hash_weights(world), tasks.data_sets.origins, torch.device("cpu"))
    store.write(path, document, {"seconds": 1.5} | facts)
    written = json.loads(path.read_text())
    expected_keys = {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "git_hash"}
    expected_keys |= {"date", "lm_eval_version", "model_source", "model_name", "task_hashes"}
    assert expected_keys <= written.keys()
    assert written["config"]["model"] == "lightlm"
    assert written["config"]["model_args"] == {"pretrained": str(world.path), "dtype": "float32"}
    assert written["results"]["quiz"]["acc,none"] == document["results"]["quiz"]["acc,none"]
    facts = json.loads(path.with_suffix(".meta.json").read_text())
    assert facts["seconds"] == 1.5
    assert facts["versions"].keys() >= {"lightlm", "lm_eval", "torch", "python", "datasets", "tokenizers"}


def test_file_names_stay_short_and_apart() -> None:
    many = [f"task_with_a_long_name_{n}" for n in range(30)]
    first, second = store.file_stem(Settings(many)), store.file_stem(Settings([*many, "x"]))
    assert len(first) < 200
    assert first != second


def test_file_names_of_globs_are_names_on_windows_and_stay_apart() -> None:
    names = [store.file_stem(Settings([task])) for task in ("blimp_*", "blimp_?", "blimp_[ab]", 'a<b>:"|c')]
    assert not set("".join(names)) & set('<>:"/\\|?*')
    assert len(set(names)) == 4
    assert store.file_stem(Settings(["blimp_[ab]", "arc-easy.v2", "t/own.yaml"], limit=3)) == (
        "blimp_[ab]+arc-easy.v2+own_limit3"
    )


def test_lm_evals_own_command_runs_it_without_transformers(world: LoadedModel) -> None:
    """`python -m lightlm.evaluate` with stock arguments, in a process that finds no transformers."""
    arguments = ["run", "--model", "lightlm", "--model_args", "pretrained=runs/demo", "--tasks", "quiz.yaml,heldout"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=Path.cwd(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("quiz", "acc_norm", "heldout", "bits_per_byte"):
        assert name in done.stdout
