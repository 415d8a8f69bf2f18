"""Stored teachers: against a plain forward pass and the live teacher, interrupted, verified, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from lightlm.convert.load import load_pretrained
from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.data.top_tokens import SUFFIX, read_stored_teacher, record_dtype, unfinished, unpacked
from lightlm.errors import DataError, DiskFullError, RecipeError, UsageError
from lightlm.recipe import load_recipe
from lightlm.train.teaching import store
from lightlm.train.teaching.store import Piece, pieces_of, store_teacher
from tests.corpus import make_workspace
from tests.train.watch import Recorder, comparable, make_trainer, resume, start

SHORT = ("train.tokens=512", "eval.every=512", "eval.prompts=[]")
TAUGHT = ("train.distill.teacher=stored", "train.distill.weight=0.5")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("stored"), 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start("tiny.yaml", "model.max_seq_len=64", "train.seq_len=32", "eval.prompts=[]", name="large")
        prepare("tiny.jsonl", "large", "data/top", val_fraction=0.1, shard_tokens=1024)
        store_teacher(Path("data/top"), "large", top_k=8, dtype="float32")
    return folder


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.mark.parametrize(("length", "context"), [(5, 8), (8, 8), (9, 8), (30, 8), (30, 5), (3, 2)])
def test_pieces_cover_each_token_once_with_a_quarter_of_a_context_before_it(length, context):
    starts = np.array([0, length, length + 1])
    pieces = list(pieces_of(starts, length + 4, context))
    assert [n for piece in pieces for n in range(piece.first, piece.end)] == list(range(length + 4))
    for piece in pieces:
        assert piece.end - piece.start <= context
        begin = max(start for start in starts if start <= piece.first)
        assert piece.start >= begin
        assert piece.start == begin or piece.first - piece.start >= context // 4
    assert pieces[0] == Piece(0, 0, min(length, context))


def expected_logits(stream, context):
    """Of each token of the train split by a plain forward pass over its piece, in float64."""
    model = load_pretrained("large").model.double()
    rows = np.empty((len(stream), 320))
    for piece in pieces_of(stream.document_starts(), len(stream), context):
        with torch.no_grad():
            logits = model(torch.from_numpy(stream.slice(piece.start, piece.end - piece.start))[None])[0]
        rows[piece.first : piece.end] = logits[piece.first - piece.start :].numpy()
    return rows


def test_records_are_the_likeliest_tokens_and_the_mass_of_the_others():
    data = DataFolder.open("data/top")
    stored, arrays = data.top_tokens()
    stream = data.split("train")
    assert len(stored.shards) > 1  # documents cross shards
    assert (stored.top_k, stored.context, len(arrays)) == (8, 64, len(stream))
    assert arrays.dtype.itemsize == 8 * (2 + 2) + 2
    logits = expected_logits(stream, 64)
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    records = unpacked(arrays.slice(0, len(arrays)))
    assert np.allclose(np.take_along_axis(p, records.ids, 1), np.exp(records.log_p), rtol=5e-3)
    assert np.allclose(np.sort(p)[:, -8:][:, ::-1], np.exp(records.log_p), rtol=5e-3)
    rest = 1 - np.sort(p)[:, -8:].sum(-1)
    assert np.allclose(rest, np.exp(records.log_rest), rtol=5e-3)
    assert stored.rest == pytest.approx(rest.mean(), rel=1e-4)
    assert np.allclose(np.exp(records.log_p).sum(-1) + np.exp(records.log_rest), 1, atol=1e-5)


def test_records_of_a_large_vocabulary_have_wider_ids():
    assert record_dtype(64, 65_536).itemsize == 258
    assert record_dtype(64, 65_537).itemsize == 386


def one_step(name, *overrides, dataset="top"):
    data = () if any("data.mix" in override for override in overrides) else (f"data.dataset={dataset}",)
    recipe = load_recipe("tiny.yaml", [*data, *overrides, *SHORT])
    watch = Recorder()
    make_trainer(recipe, name, watch).train()
    return watch.metrics[0]


def live_step(name, *overrides, dataset="top"):
    from lightlm.convert.load import find_start

    teacher = ("train.distill.teacher=large", "train.distill.dtype=float32")
    recipe = load_recipe("tiny.yaml", [f"data.dataset={dataset}", *teacher, *overrides, *SHORT], find_start=find_start)
    watch = Recorder()
    make_trainer(recipe, name, watch).train()
    return watch.metrics[0]


def test_stored_and_live_teachers_agree_within_the_cut_where_contexts_are_the_same():
    """Conversations begin in their sequence. With all tokens stored they agree; with fewer, the divergence is lower."""
    lines = [{"prompt": f"Say {n}", "completion": f"The clock says {n}."} for n in range(120)]
    Path("talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    Path("plain.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    template = Path("plain.jinja").read_text()
    masked = ("data.document_mask=true", "train.seq_len=32", "model.max_seq_len=32")
    found = {}
    for top_k in (320, 32, 4):
        name = f"talk-{top_k}"
        prepare(
            "talk.jsonl", "large", f"data/{name}", text_column=ChatColumns("chat"), val_fraction=0.1,
            chat_template=template,
        )  # fmt: skip
        store_teacher(Path("data") / name, "large", top_k=top_k, dtype="float32")
        found[top_k] = one_step(name, *TAUGHT, *masked, dataset=name)
    live = live_step("talk-live", "train.distill.weight=0.5", *masked, dataset="talk-4")
    assert found[320]["loss"] == live["loss"]
    assert found[320]["kl_loss"] == pytest.approx(live["kl_loss"], rel=2e-3)
    assert found[320]["grad_norm"] == pytest.approx(live["grad_norm"], rel=2e-3)
    assert found[4]["kl_loss"] < found[32]["kl_loss"] < live["kl_loss"]


def test_a_stopped_run_resumes_exactly_and_refuses_other_probabilities():
    recipe = load_recipe("tiny.yaml", ["data.dataset=top", *TAUGHT, "train.tokens=2560"])
    whole = Recorder()
    make_trainer(recipe, "whole", whole).train()
    assert whole.facts["teacher"] == "stored, the top 8 tokens of large: weight 0.5"
    assert whole.metrics[-1]["kl_loss"] < whole.metrics[0]["kl_loss"]
    stopped = Recorder(terminate_at=3)
    make_trainer(recipe, "stopped", stopped).train()
    after = resume("stopped")[1].metrics
    assert comparable(stopped.metrics + after) == comparable(whole.metrics)
    shutil.copytree("data/top", "data/top-4")
    shutil.rmtree("data/top-4/teacher")
    store_teacher(Path("data/top-4"), "large", top_k=4)
    with pytest.raises(RecipeError, match=r"stored \(train\.distill\.teacher\) is not the teacher that"):
        resume("stopped", "data.dataset=data/top-4", "train.tokens=2816")


def test_mixtures_need_one_teacher_in_all_folders():
    shutil.copytree("data/top", "data/other-k")
    shutil.rmtree("data/other-k/teacher")
    with pytest.raises(DataError, match="data/other-k holds no probabilities of a teacher"):
        one_step("mixed", *TAUGHT, "data.mix={top: 1, other-k: 1}")
    store_teacher(Path("data/other-k"), "large", top_k=4)
    with pytest.raises(DataError, match="the top 8 of large, the top 4 of large; store the same in both"):
        one_step("mixed", *TAUGHT, "data.mix={top: 1, other-k: 1}")


def test_verify_covers_the_records():
    shutil.copytree("data/top", "data/damaged")
    DataFolder.open("data/damaged").verify()
    path = Path("data/damaged/teacher/train_000000.top")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"teacher.train_000000\.top: checksum"):
        DataFolder.open("data/damaged").verify()
    path.write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"train_000000\.top has \d+ bytes"):
        one_step("damaged", *TAUGHT, dataset="damaged")


def test_a_second_call_keeps_what_is_there_and_names_what_differs():
    before = read_stored_teacher(Path("data/top"))
    assert store_teacher(Path("data/top"), "large", top_k=8) == before
    with pytest.raises(DataError, match="holds the top 8 tokens of large in a context of 64; delete the folder"):
        store_teacher(Path("data/top"), "large", top_k=9)


def test_no_room_is_said_before_it_starts(monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(store, "records_of", None)
    shutil.copytree("data/tiny", "data/full", ignore=shutil.ignore_patterns("teacher"))
    with pytest.raises(DiskFullError, match="take 258 bytes per token"):
        store_teacher(Path("data/full"), "large")


def test_settings_that_cannot_be_are_refused():
    for options, message in (
        ({"top_k": 321}, "--top-k 321: it must be between 1 and the vocabulary's 320"),
        ({"context": 65}, "--teacher-context 65: large sees at most 64 tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            store_teacher(Path("data/top"), "large", **options)
    with pytest.raises(RecipeError, match=r"train\.distill\.temperature: 2, but stored probabilities are those at"):
        load_recipe("tiny.yaml", ["train.distill={teacher: stored, temperature: 2}"])


def test_records_behind_the_state_are_written_again(monkeypatch):
    """A kill between the records of a block and the state that counts them."""
    shutil.copytree("data/top", "data/behind", ignore=shutil.ignore_patterns("teacher"))
    monkeypatch.setattr(store, "_BLOCK_TOKENS", 64)
    plain, written = store.write_text, []

    def dies(path, text):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        plain(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            store_teacher(Path("data/behind"), "large", top_k=8, dtype="float32")
    store_teacher(Path("data/behind"), "large", top_k=8, dtype="float32")
    DataFolder.open(Path("data/behind")).verify()
    for file in Path("data/top/teacher").glob(f"*{SUFFIX}"):
        sizes = [Path(name, "teacher", file.name).stat().st_size for name in ("data/top", "data/behind")]
        assert sizes[0] == sizes[1]


def test_a_second_process_is_refused():
    shutil.copytree("data/top", "data/held", ignore=shutil.ignore_patterns("teacher"))
    unfinished(Path("data/held")).mkdir()
    with (
        FileLock(unfinished(Path("data/held")) / "lock"),
        pytest.raises(DataError, match=r"Another `lightlm prepare-data` is writing data.held.teacher; wait for it"),
    ):
        store_teacher(Path("data/held"), "large", top_k=8)


COMMAND = ("prepare-data", "tiny.jsonl", "--tokenizer", "large", "--val-fraction", "0.1", "--teacher", "large")


def command(*arguments):
    return [sys.executable, "-c", "import lightlm.train.teaching.store as s; s._BLOCK_TOKENS = 64; "
            "from lightlm.cli.app import main; main()", *COMMAND, *arguments]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_command_resumes_to_the_same_bytes(number):
    """Whichever block it has reached."""
    name = f"cut-{number.name}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("--out", "data/uncut", "--top-k", "6"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        command("--out", f"data/{name}", "--top-k", "6"), env=environment, stderr=subprocess.PIPE, text=True
    )
    state, deadline = Path(f"data/.{name}.teacher.partial/state.json"), time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert "Progress is saved. Rerun the same command to resume." in errors
    assert not Path(f"data/{name}/teacher").exists()
    done = subprocess.run(
        command("--out", f"data/{name}", "--top-k", "6", "--json"), check=True, env=environment, capture_output=True
    )
    assert json.loads(done.stdout)["teacher"]["top_k"] == 6
    assert not state.parent.exists()
    for file in Path("data/uncut/teacher").iterdir():
        assert file.read_bytes() == (Path(f"data/{name}/teacher") / file.name).read_bytes()
