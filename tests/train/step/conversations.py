"""A data folder of random conversations, written by hand; and the loss of conversations run one by one, in float64."""

import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import torch

from lightlm.data.folder import DataFolder
from lightlm.data.shards import ChatData, Manifest, ShardEntry, shard_header
from lightlm.files import checksum


def write_conversations(folder, tokenizer_of, lengths, seed=0):
    """Random tokens; of each conversation, one part in the middle and the end are trained on."""
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer_of / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"chat_template": ""}', encoding="utf-8")
    like = DataFolder.open(tokenizer_of).manifest
    generator = np.random.default_rng(seed)
    shards, masks, trained = [], [], {}
    for split, sizes in lengths.items():
        tokens = generator.integers(1, like.vocab_size, sum(sizes)).astype("<u2")
        marks = np.zeros(len(tokens), np.uint8)
        at = 0
        for size in sizes:
            marks[at] = 2
            marks[at + size // 3 : at + size // 2] |= size // 3 > 0
            marks[at + size - max(1, size // 4) : at + size] |= 1
            at += size
        trained[split] = int((marks & 1).sum())
        (folder / f"{split}_000000.bin").write_bytes(shard_header(tokens.dtype, len(tokens)) + tokens.tobytes())
        (folder / f"{split}_000000.mask").write_bytes(marks.tobytes())
        for kind, entries in (("bin", shards), ("mask", masks)):
            name = f"{split}_000000.{kind}"
            entries.append(
                ShardEntry(
                    file=name, split=split, tokens=len(tokens), documents=len(sizes) if kind == "mask" else 0,
                    xxh3=checksum(folder / name),
                )
            )  # fmt: skip
    manifest = Manifest(
        source="test", description="test", vocab_size=like.vocab_size, end_of_text_id=like.end_of_text_id,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(), shards=shards,
        split_rule="", text_bytes={"train": 1, "val": 1},
        chat=ChatData(train_on="assistant", template="chatml", trained_tokens=trained, masks=masks),
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")


def one_by_one(model, sequences, capacity, *, z_loss=0.0):
    """(objective, loss, targets) summed over conversations, each run by itself in float64, from the plain formula.

    `sequences` yields (tokens, masks) of whole conversations.
    """
    objective, total, count = 0.0, 0.0, 0
    for tokens, marks in sequences:
        tokens, marks = torch.as_tensor(tokens[:capacity]), torch.as_tensor(marks[:capacity])
        chosen = (marks[1:] & 1) == 1
        logits = model.hidden_states(tokens[None, :-1])[0][chosen] @ model.head_weight.T
        lse = logits.logsumexp(-1)
        losses = lse - logits[torch.arange(len(logits)), tokens[1:][chosen]]
        total, count = total + losses.sum(), count + int(chosen.sum())
        objective = objective + (losses + z_loss * lse.square()).sum()
    return objective, total, count


def conversations(folder: Path, split="train"):
    """(tokens, masks) of each conversation, read from the files without LightLM's reader."""
    tokens = np.fromfile(folder / f"{split}_000000.bin", "<u2", offset=1024).astype(np.int64)
    marks = np.fromfile(folder / f"{split}_000000.mask", np.uint8).astype(np.int64)
    starts = [*np.flatnonzero(marks & 2).tolist(), len(tokens)]
    return [(tokens[a:b], marks[a:b]) for a, b in itertools.pairwise(starts)]
