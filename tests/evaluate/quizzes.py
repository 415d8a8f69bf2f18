"""Tasks of every kind on data sets of a loopback Hub, in the form of lm-eval's own tasks."""

import json
from pathlib import Path

from tests.hub import Hub

REPO = "someone/quiz"
CARD = """---
license: mit
configs:
- config_name: hard
  data_files:
  - {split: train, path: hard/train.jsonl}
  - {split: test, path: hard/test.jsonl}
- config_name: easy
  data_files:
  - {split: train, path: easy/train.jsonl}
  - {split: test, path: easy/test.jsonl}
---
# Quiz
"""
CHOICES = """
task: quiz_{name}
tag: quiz_tag
dataset_path: someone/quiz
dataset_name: {name}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: question
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
GROUP = """
group: quizzes
task: [quiz_easy, quiz_hard]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 1.0}
"""
WRITTEN = """
task: quiz_written
dataset_path: someone/quiz
dataset_name: easy
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
PROSE = """
task: quiz_prose
dataset_path: someone/prose
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
"""
PROSE_TEXTS = ["The cat sat on the mat.", "A dog ran after the cat."]


def write_tasks(folder: Path) -> Path:
    """quiz_easy, quiz_hard (tag quiz_tag, group quizzes), quiz_written and quiz_prose."""
    folder.mkdir()
    texts = {f"quiz_{name}": CHOICES.format(name=name) for name in ("easy", "hard")}
    for name, text in {**texts, "group": GROUP, "written": WRITTEN, "prose": PROSE}.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def add_data(hub: Hub, folder: Path) -> str:
    """Both data sets of the tasks; returns the commit of `someone/quiz`."""
    quiz, prose = folder / "quiz", folder / "prose"
    for name in ("easy", "hard"):
        for split, count in (("train", 4), ("test", 6)):
            (quiz / name).mkdir(parents=True, exist_ok=True)
            docs = [
                {"question": f"The {name} cat {split} {n} sat", "choices": [" on the mat", " after it"], "gold": n % 2}
                for n in range(count)
            ]
            (quiz / name / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (quiz / "README.md").write_text(CARD, encoding="utf-8")
    prose.mkdir()
    (prose / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE_TEXTS))
    hub.add("someone/prose", prose)
    return hub.add(REPO, quiz)
