"""Inputs of a small evaluation: a data folder, a run with an untrained checkpoint, and a quiz."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightlm.checkpoint import LoadedModel, write_checkpoint
from lightlm.data.shards import Manifest, ShardEntry
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.files import checksum
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from tests.corpus import write_shard

DOCUMENTS = ["The cat sat on the mat, naïve and déjà vu.", "A dog ran after the cat; the cat ran faster. " * 6, "Ω"]

QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {folder}/quiz.jsonl}}
  cache_dir: {folder}/cache
output_type: multiple_choice
validation_split: validation
doc_to_text: question
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata:
  version: 1.0
"""


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS * 3, 320)


def tiny_model(tokenizer: Tokenizer, seed: int = 0, **shape: Any) -> Transformer:
    torch.manual_seed(seed)
    dense = ModelConfig(
        num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_seq_len=40, vocab_size=tokenizer.vocab_size
    )
    model = Transformer(replace(dense, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_data(folder: Path, tokenizer: Tokenizer, documents: Sequence[str] = DOCUMENTS) -> None:
    """A data folder with these documents in both splits, each after an end-of-text token, and one at the end."""
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    end = tokenizer.end_of_text_id
    tokens = [end, *(token for text in documents for token in [*tokenizer.encode(text), end])]
    shards = []
    for split in ("train", "val"):
        path = folder / f"{split}_000000.bin"
        write_shard(path, np.array(tokens, dtype=np.uint16))
        counts = {"tokens": len(tokens), "documents": len(documents)}
        shards.append(ShardEntry(file=path.name, split=split, xxh3=checksum(path), **counts))
    size = sum(len(text.encode()) for text in documents)
    manifest = Manifest(
        source="test",
        description="test",
        revision=None,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        shards=shards,
        split_rule="none",
        text_bytes={"train": size, "val": size},
        skipped_documents=0,
        unigram=None,
        lightlm_version="0",
        settings={},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")


def write_quiz(folder: Path) -> Path:
    """Six questions with three answers each that share their context, as in HellaSwag."""
    docs = [
        {"question": f"The cat number {n} sat", "choices": [" on the mat", " after it ran", " faster"], "gold": n % 3}
        for n in range(6)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    path = folder / "quiz.yaml"
    path.write_text(QUIZ.format(folder=folder.as_posix()), encoding="utf-8")
    return path


def write_world(folder: Path, **shape: Any) -> LoadedModel:
    """`data/tiny`, `runs/demo` with one checkpoint, and `quiz.yaml` below `folder`."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, **shape)
    write_data(folder / "data" / "tiny", tokenizer)
    run = folder / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: demo\ndata: {dataset: tiny}\n", encoding="utf-8")
    path = write_checkpoint(run, 7, model.state_dict(), model.config, tokenizer)
    (folder / "runs" / "latest").symlink_to("demo", target_is_directory=True)
    write_quiz(folder)
    return LoadedModel(model, tokenizer, path)


_CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/d.jsonl, validation: {folder}/d.jsonl}}, cache_dir: {folder}/cache}}
training_split: train
validation_split: validation
doc_to_text: "{{{{q}}}}"
output_type: multiple_choice
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, name: str = "own", docs: list[dict] | None = None, **changes: str) -> None:
    """A task of multiple choice in a folder: its documents, and changes to its text; an empty one drops a line."""
    rows = docs or [{"q": f"What is {n}?", "c": ["red", "blue"], "a": 0} for n in range(3)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _CHOICES.format(name=name, folder=folder.as_posix())
    lines = [line for line in text.strip().splitlines() if line.partition(":")[0] not in changes]
    lines += [f"{key}: {value}" for key, value in changes.items() if value]
    (folder / f"{name}.yaml").write_text("\n".join(lines))
