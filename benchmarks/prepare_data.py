"""Text to token shards: `lightlm prepare-data` beside the pipelines that people write, in one run.

    python benchmarks/prepare_data.py CORPUS --tokenizer gpt2/tokenizer.json
    python benchmarks/prepare_data.py CORPUS --tokenizer gpt2/tokenizer.json --repeat-to 2GB

Prints MB per second and peak memory of each contender, and whether its tokens equal LightLM's. CORPUS is a folder of
Parquet files with a column `text`. Every contender reads them, tokenizes, puts the end-of-text token after each
document and writes shards of 100M uint16 tokens in llm.c's layout:

    lightlm        the command of this repository: with the split, the checksums, the checks and the manifest
    tokenizers     `encode_batch` of the `tokenizers` library on batches of 1,000 documents, all cores
    tiktoken       `encode_ordinary` in a multiprocessing pool, as in nanoGPT's and modded-nanogpt's scripts

The slow ones get only the first `--peer-megabytes` of the corpus. Speed is MB of UTF-8 text per second of the whole
process, with its start. Peak memory is that of the whole process tree (proportional set size, polled ten times per
second). Needs `pip install tiktoken psutil`.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, write_json

SHARD_TOKENS = 100_000_000


def documents(corpus: Path, megabytes: float) -> Iterator[list[str]]:
    """Yield the texts of the corpus in batches, up to a size."""
    import pyarrow.parquet as parquet

    left = megabytes * 1e6
    for path in sorted(corpus.glob("*.parquet")):
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1_000, columns=["text"]):
            texts = batch.column(0).to_pylist()
            kept = []
            for text in texts:
                if left <= 0:
                    break
                kept.append(text)
                left -= len(text.encode())
            if kept:
                yield kept


class Shards:
    """A writer like that of llm.c's and modded-nanogpt's scripts: it buffers one shard and writes it when full."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._buffer, self._fill, self._count = folder, np.empty(SHARD_TOKENS, np.uint16), 0, 0

    def add(self, tokens: np.ndarray) -> None:
        while tokens.size:
            part = tokens[: SHARD_TOKENS - self._fill]
            self._buffer[self._fill : self._fill + part.size] = part
            self._fill += part.size
            tokens = tokens[part.size :]
            if self._fill == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, self._fill
        with (self._folder / f"train_{self._count:06d}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.write(self._buffer[: self._fill].tobytes())
        self._fill, self._count = 0, self._count + 1


def run_tokenizers(corpus: Path, tokenizer: Path, out: Path, megabytes: float) -> None:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.encode_special_tokens = True
    end = encoder.token_to_id("<|endoftext|>")
    shards = Shards(out)
    for texts in documents(corpus, megabytes):
        for item in encoder.encode_batch(texts, add_special_tokens=False):
            shards.add(np.array([*item.ids, end], np.uint16))
    shards.close()


def tiktoken_encoding(path: Path):  # type: ignore[no-untyped-def]
    """Return GPT-2's encoding from a tokenizer.json; tiktoken itself would download it."""
    import tiktoken

    content = json.loads(path.read_text(encoding="utf-8"))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks = {
        bytes(alphabet[character] for character in token): rank
        for token, rank in content["model"]["vocab"].items()
        if token not in special
    }
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding("gpt2-local", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _start(path: Path) -> None:
    global _encoding
    _encoding = tiktoken_encoding(path)


def _encode(text: str) -> np.ndarray:
    return np.array([*_encoding.encode_ordinary(text), _encoding.eot_token], np.uint16)


def run_tiktoken(corpus: Path, tokenizer: Path, out: Path, megabytes: float) -> None:
    shards = Shards(out)
    with multiprocessing.Pool(os.cpu_count(), _start, (tokenizer,)) as pool:
        texts = (text for batch in documents(corpus, megabytes) for text in batch)
        for tokens in pool.imap(_encode, texts, chunksize=16):
            shards.add(tokens)
    shards.close()


PEERS = {"tokenizers": run_tokenizers, "tiktoken": run_tiktoken}


def repeat(corpus: Path, target: int, out: Path) -> Path:
    """Repeat the corpus until it has `target` bytes of text; each text starts with the number of its copy."""
    import pyarrow
    import pyarrow.parquet as parquet

    done = copy = 0
    while done < target:
        for path in sorted(corpus.glob("*.parquet")):
            file = parquet.ParquetFile(path)
            with parquet.ParquetWriter(out / f"{copy:03d}-{path.name}", pyarrow.schema([("text", "string")])) as writer:
                for group in range(file.num_row_groups):
                    texts = [f"Copy {copy}. {t}" for t in file.read_row_group(group, ["text"]).column(0).to_pylist()]
                    done += sum(len(text.encode()) for text in texts)
                    writer.write_table(pyarrow.table({"text": texts}))
            if done >= target:
                break
        copy += 1
    return out


def measured(command: list[str]) -> tuple[float, float]:
    """Return the seconds and the peak MB of a process and its children."""
    import psutil

    began, peak = time.perf_counter(), 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for member in (root, *root.children(recursive=True)):
                memory = member.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
        except psutil.Error:
            pass
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, peak / 1e6


def text_bytes(corpus: Path, megabytes: float) -> int:
    return sum(len(text.encode()) for batch in documents(corpus, megabytes) for text in batch)


def tokens_of(folder: Path) -> np.ndarray:
    """Return all train tokens of a folder of shards."""
    return np.concatenate([np.fromfile(path, np.uint16)[512:] for path in sorted(folder.glob("train_*.bin"))])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's tokenizer.json")
    parser.add_argument("--repeat-to", help="make a corpus of this size, for example 2GB, and measure lightlm on it")
    parser.add_argument("--peer-megabytes", type=float, default=20)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--only", choices=[*PEERS, "lightlm"])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--work", type=Path, help="a folder for temporary files")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        PEERS[arguments.peer[0]](
            arguments.corpus, arguments.tokenizer, Path(arguments.peer[1]), arguments.peer_megabytes
        )
        return
    missing = [name for name in ("tiktoken", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"this benchmark needs packages that are not installed: pip install {' '.join(missing)}")
    from measure import machine_facts

    facts = machine_facts(None, "gigatoken", "tokenizers", "tiktoken", "pyarrow", "numpy")
    print(f"{os.cpu_count()} cores", *facts.values(), sep="\n")
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        compare(arguments, Path(work), facts)


def compare(arguments: argparse.Namespace, work: Path, facts: dict[str, Any]) -> None:
    """Run every contender and print its row."""
    corpus = arguments.corpus
    if arguments.repeat_to:
        (work / "corpus").mkdir()
        corpus = repeat(corpus, int(float(arguments.repeat_to.upper().removesuffix("GB")) * 1e9), work / "corpus")
    everything = text_bytes(corpus, float("inf"))
    speeds, rows = {}, []
    print(f"{'':12}{'MB of text':>12}{'seconds':>10}{'MB/s':>8}{'peak MB':>10}")
    for name in ("lightlm", *PEERS):
        if arguments.only not in (None, name) or (arguments.repeat_to and name != "lightlm"):
            continue
        size = everything if name == "lightlm" else text_bytes(corpus, arguments.peer_megabytes)
        seconds, peak = float("inf"), 0.0
        for _ in range(arguments.repetitions):
            out = work / name
            shutil.rmtree(out, ignore_errors=True)
            if name == "lightlm":
                command = [sys.executable, "-m", "lightlm", "prepare-data", str(corpus), "--val-fraction", "0"]
                command += ["--tokenizer", str(arguments.tokenizer), "--out", str(out)]
            else:
                out.mkdir()
                command = [sys.executable, __file__, str(corpus), "--tokenizer", str(arguments.tokenizer)]
                command += ["--peer", name, str(out), "--peer-megabytes", str(arguments.peer_megabytes)]
            again, memory = measured(command)
            seconds, peak = min(seconds, again), max(peak, memory)
        speeds[name] = size / 1e6 / seconds
        rows.append(
            {"name": name, "text_mb": size / 1e6, "seconds": seconds, "mb_per_s": speeds[name], "peak_mb": peak}
        )
        print(f"{name:12}{size / 1e6:12.1f}{seconds:10.2f}{speeds[name]:8.1f}{peak:10.0f}", flush=True)
    about = {**facts, "cores": os.cpu_count(), "corpus": str(arguments.corpus), "repeated_to": arguments.repeat_to}
    write_json(about | {"rows": rows}, arguments.out)
    for name in speeds.keys() - {"lightlm"}:
        ratio = f", lightlm is {speeds['lightlm'] / speeds[name]:.0f} times as fast" if "lightlm" in speeds else ""
        theirs = tokens_of(work / name)
        same = "lightlm" in speeds and bool((tokens_of(work / "lightlm")[: theirs.size] == theirs).all())
        print(f"{name}: {theirs.size:,} tokens{', equal to those of lightlm' if same else ''}{ratio}")


if __name__ == "__main__":
    main()
