"""The data of benchmarks/learning.py: one corpus with four vocabularies, and its beginning for runs of several epochs.

    python benchmarks/learning_data.py CORPUS --work WORK

makes WORK/data/corpus-4k, corpus-8k, corpus-16k and corpus-32k (as train:4096 and so on), and corpus-750k, corpus-375k,
corpus-188k and corpus-94k, which hold the first documents of the corpus (as many training tokens) and all its documents
for validation, with the tokenizer of corpus-8k. CORPUS is a folder of Parquet files with a column `text`.

    python benchmarks/learning_data.py CORPUS --work WORK --teacher HuggingFaceTB/SmolLM2-135M-Instruct

makes WORK/data/corpus-smollm2 alone: some 1M tokens for training with that model's tokenizer, and what it says of them,
258 bytes per token. The same command resumes.

    python benchmarks/learning_data.py CORPUS --work WORK --heldout

makes WORK/data/heldout-8k alone, of the study `heldout`: all documents of CORPUS, which holds none of those above, only
for validation, with the tokenizer of corpus-8k.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import xxhash
from common import make_parser

VAL_FRACTION = 0.005  # that of `lightlm prepare-data`
VOCABULARIES = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}
BEGINNINGS = {"750k": 750_000, "375k": 375_000, "188k": 187_500, "94k": 93_750}  # training tokens


def prepare(source: Path, tokenizer: str, out: Path, *options: str) -> None:
    """Run `lightlm prepare-data` unless the folder is there."""
    if (out / "manifest.json").is_file():
        return
    arguments = [str(source), "--tokenizer", tokenizer, "--out", str(out), *options]
    command = [sys.executable, "-m", "lightlm", "prepare-data", *arguments]
    subprocess.run(command, check=True)


def prepare_taught(source: Path, teacher: str, out: Path) -> None:
    """Run `lightlm prepare-data` with a teacher."""
    size = ["--max-tokens", "1.15M", "--val-fraction", "0.1"]
    names = ["--tokenizer", teacher, "--teacher", teacher, "--out", str(out)]
    subprocess.run([sys.executable, "-m", "lightlm", "prepare-data", str(source), *size, *names], check=True)


def beginning(corpus: Path, tokenizer_file: Path, tokens: int) -> Iterator[str]:
    """Yield all documents for validation, and the first others until they have so many tokens; the last one is cut."""
    from lightlm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    for path in sorted(corpus.glob("*.parquet")):
        for text in parquet.read_table(path, columns=["text"])["text"].to_pylist():
            if xxhash.xxh3_64_intdigest(text.encode()) % 2**32 < VAL_FRACTION * 2**32:
                yield text
            elif tokens > 0:
                ids = tokenizer.encode(text)[: tokens - 1]
                tokens -= len(ids) + 1  # and the end-of-text token
                yield tokenizer.decode(ids)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher", metavar="MODEL", help="make only the data of the study `teacher`")
    parser.add_argument("--heldout", action="store_true", help="make only the data of the study `heldout`")
    options = parser.parse_args()
    data = options.work / "data"
    tokenizer = data / "corpus-8k" / "tokenizer.json"
    if options.heldout:
        prepare(options.corpus, str(tokenizer), data / "heldout-8k", "--val-fraction", "1")
        return
    if options.teacher is not None:
        prepare_taught(options.corpus, options.teacher, data / "corpus-smollm2")
        return
    for name, size in VOCABULARIES.items():
        prepare(options.corpus, f"train:{size}", data / f"corpus-{name}")
    for name, tokens in BEGINNINGS.items():
        lines = data / f"corpus-{name}.jsonl"
        texts = beginning(options.corpus, tokenizer, tokens)
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        prepare(lines, str(tokenizer), data / f"corpus-{name}")


if __name__ == "__main__":
    main()
