"""The cloze made from validation documents: properties of its examples, and their scores."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from lightlm.checkpoint import LoadedModel
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.errors import DataError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results import rows as results
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import cloze, heldout, manager
from lightlm.evaluate.tasks.manager import Tasks
from tests.corpus import texts
from tests.evaluate.tiny_run import tiny_model, write_world


def documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 12 to 48 sentences in lines, with ASCII and accents."""
    short = texts(4 * count, seed)
    return ["\n".join(short[n::count]).replace("clock", "réveil") for n in range(count)]


def flat(text: str) -> str:
    return " ".join(text.split())


def rows(examples: list[cloze.Example]) -> list[tuple[str, list[str], int]]:
    return [(example.context, example.endings, example.label) for example in examples]


@pytest.fixture(scope="module")
def found() -> list[cloze.Example]:
    return cloze.examples(documents(60))


def test_the_right_ending_follows_and_the_others_come_from_other_documents(found: list[cloze.Example]) -> None:
    all_texts = [flat(text) for text in documents(60)]
    assert len(found) > 60
    for example in found:
        own = all_texts[example.documents[example.label]]
        assert f"{example.context} {example.endings[example.label]}" in own
        assert len(set(example.documents)) == len(set(example.endings)) == 4
        for index, (ending, document) in enumerate(zip(example.endings, example.documents, strict=True)):
            assert ending in all_texts[document]
            assert index == example.label or ending not in own


def test_endings_are_matched_in_length_and_cut_alike(found: list[cloze.Example]) -> None:
    all_texts = [flat(text) for text in documents(60)]
    for example in found:
        right = example.endings[example.label]
        assert example.context[-1] == "."
        assert 320 <= len(example.context) + 1 <= 640
        for ending, document in zip(example.endings, example.documents, strict=True):
            assert 98 <= len(ending) <= 102
            assert abs(len(ending.encode()) - len(right.encode())) <= 0.05 * len(right.encode())
            place = all_texts[document].index(ending)
            assert all_texts[document][place - 2 : place] == ". "
            assert f"{all_texts[document]} "[place + len(ending)] == " "


def test_nothing_but_the_texts_decides(found: list[cloze.Example]) -> None:
    shuffled = documents(60)
    random.Random(5).shuffle(shuffled)
    assert rows(cloze.examples(shuffled)) == rows(found)
    assert rows(cloze.examples(documents(60) + documents(60))) == rows(found)
    assert rows(cloze.examples(documents(60), 10)) == rows(found[:10])
    assert len({example.documents[example.label] for example in found[:20]}) == 20  # one of each document comes first


def test_endings_by_themselves_give_no_clue(found: list[cloze.Example]) -> None:
    """Word frequencies, word counts and lengths do not reveal the right ending."""
    many = found + cloze.examples(documents(200, seed=1))
    counts = Counter(word for example in many for word in example.endings[example.label].lower().split())
    for score in (
        lambda ending: sum(math.log((counts[word] + 1) / counts.total()) for word in ending.lower().split()),
        lambda ending: len(ending.split()),
        lambda ending: -len(ending),
    ):
        right = 0.0
        for example in many:
            best = max(map(score, example.endings))
            tied = [ending for ending in example.endings if score(ending) == best]
            right += (example.endings[example.label] in tied) / len(tied)
        assert abs(right / len(many) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(many))
    labels = Counter(example.label for example in many)
    assert min(labels[place] for place in range(4)) > 0.8 * len(many) / 4


def test_a_version_of_a_document_gives_no_wrong_endings() -> None:
    """Not even passages that the document lacks, since they may continue it just as well."""
    originals, others = documents(6), documents(6, seed=7)
    versions = [text[: len(text) // 2] + other for text, other in zip(originals, others, strict=True)]
    found = cloze.examples(originals + versions)
    assert len(found) > 12
    for example in found:
        right, *wrong = sorted(example.documents, key=lambda document: document != example.documents[example.label])
        assert right % 6 not in {document % 6 for document in wrong}


def test_a_passage_that_the_document_quotes_is_not_a_wrong_ending() -> None:
    """One of four documents has only such a passage, so no example can be made of the quoting document."""
    rng = random.Random(0)
    quoting, *rest = (flat(text) for text in documents(3))
    quoted = next(cloze._passages(quoting, 0))
    words = " ".join(f"word{rng.randint(0, 10**6)}" for _ in range(400))
    source = f"{words} ends. {flat(documents(1, seed=9)[0])[:330]} then so. {quoted.ending}"
    assert [passage.ending for passage in cloze._passages(source, 1)] == [quoted.ending]
    found = cloze.examples([quoting, source, *rest])
    assert {example.documents[example.label] for example in found} == {1, 2, 3}


def test_abbreviations_and_lists_are_not_sentences() -> None:
    assert not cloze.examples(["word " * 500 + f"{n}" for n in range(9)])
    text = flat(documents(1)[0])
    assert not any(ending.startswith("Smith") for ending in _endings(text.replace(". ", ". Then Mr. Smith came. ")))


def _endings(text: str) -> list[str]:
    return [passage.ending for passage in cloze._passages(text, 0)]


def test_scripts_without_spaces_are_cut_between_characters() -> None:
    rng = random.Random(3)
    words = [
        "小猫",
        "大海",
        "老师",
        "明天",
        "下雨",
        "看见",
        "河边",
        "唱歌",
        "石头",
        "安静",
        "早晨",
        "绿色",
        "记得",
        "影子",
    ]
    chinese = ["".join("".join(rng.choices(words, k=rng.randint(4, 9))) + "。" for _ in range(150)) for _ in range(8)]
    found = cloze.examples(chinese)
    assert len(found) > 8
    assert all({len(ending) for ending in example.endings} == {100} for example in found)


@pytest.mark.parametrize("limits", [None, (20, 30_000)])
def test_the_tokenizer_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int] | None
) -> None:
    """Also if there are too many documents, or too long ones, to read all."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(120)))
    if limits:
        monkeypatch.setattr(heldout, "_CLOZE_DOCUMENTS", limits[0])
        monkeypatch.setattr(heldout, "_CLOZE_BYTES", limits[1])
    found = []
    for size in (300, 500):
        prepare(str(source), f"train:{size}", tmp_path / str(size), val_fraction=0.5)
        found.append(heldout.load_cloze(data=str(tmp_path / str(size)))["validation"].to_list())
    assert found[0] == found[1]
    split = DataFolder.open(tmp_path / "500").split("val")
    assert len(found[0]) > 10
    assert sum(1 for _ in split.documents()) > 40


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manager, "_OURS", {"heldout", "heldout_cloze"})  # skips lm-eval's index: 5 s
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(40)))
    prepare(str(source), "train:400", tmp_path / "data" / "long", val_fraction=0.5)
    tokenizer = DataFolder.open(tmp_path / "data" / "long").tokenizer
    return LoadedModel(tiny_model(tokenizer, max_seq_len=512), tokenizer, tmp_path / "model")


@torch.no_grad()
def log_likelihood(loaded: LoadedModel, context: str, ending: str) -> float:
    before = loaded.tokenizer.encode(context) if context else [loaded.tokenizer.end_of_text_id]
    after = loaded.tokenizer.encode(f" {ending}")
    log_probs = loaded.model(torch.tensor([before + after]))[0].double().log_softmax(-1)
    return sum(float(log_probs[len(before) - 1 + n, token]) for n, token in enumerate(after))


def test_scores_are_those_of_a_hand_computation(world: LoadedModel) -> None:
    document = run_tasks(LightLM(world), Tasks(Settings(["heldout"], limit=12, data="long"))).results
    figures = {(row.task, row.metric): row for row in results.rows(document)}
    right = {"acc": 0, "acc_norm": 0, "acc_mutual_info": 0}
    for row in heldout.load_cloze(data="long")["validation"].to_list()[:12]:
        plain = [log_likelihood(world, row["context"], ending) for ending in row["endings"]]
        without = [log_likelihood(world, "", ending) for ending in row["endings"]]
        values = {
            "acc": plain,
            "acc_norm": [value / len(ending) for value, ending in zip(plain, row["endings"], strict=True)],
            "acc_mutual_info": [value - other for value, other in zip(plain, without, strict=True)],
        }
        for metric, scores in values.items():
            right[metric] += scores.index(max(scores)) == row["label"]
    for metric, count in right.items():
        row = figures["heldout_cloze", metric]
        assert (row.value, row.documents) == (pytest.approx(count / 12), 12)
        assert row.stderr == pytest.approx(math.sqrt(count / 12 * (1 - count / 12) / 11))
    assert figures["heldout", "bits_per_byte"].documents == 12  # in the same table


def test_where_there_is_no_cloze_heldout_goes_without(world: LoadedModel, tmp_path: Path) -> None:
    write_world(tmp_path / "small")  # three documents
    notes: list[str] = []
    tasks = Tasks(Settings(["heldout"], data="small/data/tiny"), notes.append)
    for _ in range(2):
        assert run_tasks(LightLM(world), tasks).results["results"].keys() == {"heldout"}
    [note] = notes
    assert "heldout_cloze" in note
    assert "--val-fraction" in note
    with pytest.raises(DataError, match="fewer than 4 validation documents"):
        run_tasks(LightLM(world), Tasks(Settings(["heldout_cloze"], data="small/data/tiny")))
    short = LoadedModel(tiny_model(world.tokenizer, max_seq_len=16), world.tokenizer, world.path)
    tasks = Tasks(Settings(["heldout"], limit=2, data="long"), notes.append)
    assert run_tasks(LightLM(short), tasks).results["results"].keys() == {"heldout"}
    assert "16" in notes[1]
