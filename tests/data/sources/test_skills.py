"""The generated skills: right answers by an independent reading of the question, and questions that are held out."""

import itertools
import re

from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.data.sources import skills
from lightlm.data.sources.skills import SKILLS, conversations, held_out


def solve(question):
    """The answer, read from the question's words."""
    if match := re.fullmatch(r"Copy: (.+)", question):
        return match[1]
    if match := re.fullmatch(r"Reverse: (.+)", question):
        return match[1][::-1]
    if match := re.fullmatch(r"How many (.) are in: (.+)", question):
        return str(sum(letter == match[1] for letter in match[2].split()))
    if match := re.fullmatch(r"What is (\d+) \+ (\d+)\?", question):
        return str(int(match[1]) + int(match[2]))
    if match := re.fullmatch(r"Copy from (\w+): (.+)", question):
        return " ".join(match[2].split()[match[2].split().index(match[1]) :])
    text, color = re.fullmatch(r"(\w+ has .+\.) What is (\w+)\?", question).groups()
    return re.search(rf"a {color} \w+", text)[0]


def test_answers_are_right_and_held_out_questions_do_not_occur():
    asked = set()
    for talk in itertools.islice(conversations(), 4_000):
        text = talk[0]["content"].rpartition("What is")[0] if " has " in talk[0]["content"] else ""
        for user, assistant in zip(talk[::2], talk[1::2], strict=True):
            question = user["content"] if user["content"].startswith(text) else text + user["content"]
            assert solve(question) == assistant["content"]
            asked.add(question)
    assert 25 < len(held_out("add", 400)) < 100  # of 441 questions
    for skill in SKILLS:
        questions = held_out(skill, 25)
        assert len(dict(questions)) == 25
        assert questions == held_out(skill, 25)
        assert all(solve(question) == answer for question, answer in questions)
        assert asked.isdisjoint(dict(questions))


def test_the_source_needs_no_option(tmp_path, monkeypatch):
    monkeypatch.setattr(skills, "CONVERSATIONS", 1_000)
    manifest = prepare("skills", None, tmp_path / "skills", max_tokens=3_000)
    assert manifest.chat.train_on == "assistant"
    assert 386 < manifest.vocab_size <= 470  # that of all conversations
    texts = DataFolder.open(tmp_path / "skills").beginnings(9)
    assert all(text.count("⟦") == text.count("<|im_end|>⟧\n") > 0 for text in texts)
