"""De-duplication and decontamination: speed, memory, and the quality of the pairs that MinHash libraries find.

    export OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1
    python benchmarks/clean.py [--corpus FOLDER] [--evals FOLDER] [--documents 10M]

Prints microseconds and bytes per document of the decisions; with a corpus also the errors of MinHash libraries, and MB
per second of each piece of work on a document. FOLDER holds .parquet files with a column `text`; --evals is a folder
in the Hub's layout (Rowan/hellaswag, ...). Needs rensa, and datasketch for the comparison. Times are CPU time, so they
hold for one core.
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from common import make_parser

from lightlm.data.select.decontamination import Decontaminator
from lightlm.data.select.deduplication import BANDS, ROWS, Deduplicator, Signer, shingles
from lightlm.data.select.ngrams import ngram_hashes
from lightlm.quantities import parse_quantity
from lightlm.train.observe.metrics import peak_memory

NUMBERS = BANDS * ROWS
EDITS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)  # shares of a text's words
TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "boolq")

Signatures = Callable[[list[np.ndarray]], np.ndarray]


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return peak_memory(torch.device("cpu")) or 0


def read(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.parquet"))
    return [text for file in files for text in parquet.read_table(file, columns=["text"])["text"].to_pylist()]


def speed(name: str, texts: Sequence[str], work: Callable[[list[str]], object]) -> None:
    """Print the megabytes of UTF-8 per second of calls with chunks of 4 MB, as in the pipeline."""
    chunks: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size > 4e6:
            chunks.append([])
            size = 0
        chunks[-1].append(text)
        size += len(text)
    started = time.process_time()
    for chunk in chunks:
        work(chunk)
    seconds = time.process_time() - started
    print(f"  {name:34} {sum(len(text.encode()) for text in texts) / 1e6 / seconds:7.0f} MB/s", flush=True)


def rensa_full(sets: list[np.ndarray]) -> np.ndarray:
    from rensa import RMinHash

    ends = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), ends, NUMBERS, 1)
    return np.array(matrix.to_rows(), np.uint64)


def rensa_rho(sets: list[np.ndarray]) -> np.ndarray:
    from rensa import RMinHash

    ends = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes_rho(np.concatenate(sets), ends, NUMBERS, 1)
    return np.array(matrix.to_rows(), np.uint64)


def datasketch(sets: list[np.ndarray]) -> np.ndarray:
    from datasketch import MinHash

    rows = []
    for hashes in sets:
        sketch = MinHash(num_perm=NUMBERS, hashfunc=int)
        sketch.update_batch(hashes & np.uint64(0xFFFFFFFF))
        rows.append(sketch.hashvalues)
    return np.array(rows, np.uint64)


def planted(texts: list[str], count: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return texts of 60 to 3,000 words, copies with words replaced, and the exact similarities of their 5-grams."""
    rng = random.Random(0)
    suitable = [words for text in texts if 60 < len(words := text.split()) < 3_000]
    originals, copies, similarities = [], [], []
    for _ in range(count):
        words, share = rng.choice(suitable), rng.choice(EDITS)
        edited = [f"other{rng.randrange(10**6)}" if rng.random() < share else word for word in words]
        one, other = (np.unique(shingles(" ".join(version))) for version in (words, edited))
        shared = len(np.intersect1d(one, other))
        originals.append(one)
        copies.append(other)
        similarities.append(shared / (len(one) + len(other) - shared))
    return originals, copies, np.array(similarities)


def compare_libraries(texts: list[str]) -> None:
    print(f"MinHash libraries, {NUMBERS} numbers, on the same hashes of 5-grams")
    originals, copies, truth = planted(texts, 3_000)
    ideal = np.sqrt((truth * (1 - truth) / NUMBERS).mean())
    print(f"  3,000 planted pairs; an ideal estimate has an error of {ideal:.4f}")
    libraries: tuple[Signatures, ...] = (rensa_full, rensa_rho, datasketch)
    some = [shingles(text) for text in texts[:300]]
    size = sum(len(text.encode()) for text in texts[:300]) / 1e6
    for library in libraries:
        started = time.process_time()
        library(some)
        rate = size / (time.process_time() - started)
        agree = library(originals) == library(copies)
        error = np.sqrt(((agree.mean(axis=1) - truth) ** 2).mean())
        found = agree.reshape(-1, BANDS, ROWS).all(axis=2).any(axis=1)
        shares = [f"{found[(truth >= low) & (truth < low + 0.1)].mean():.2f}" for low in np.arange(0.4, 1, 0.1)]
        print(f"  {library.__name__:10} {rate:6.0f} MB/s, error {error:.4f}, found from 0.4 by 0.1: {' '.join(shares)}")
    promised = 1 - (1 - truth**ROWS) ** BANDS
    shares = [f"{promised[(truth >= low) & (truth < low + 0.1)].mean():.2f}" for low in np.arange(0.4, 1, 0.1)]
    print(f"  {'in theory':10} {'':34} found from 0.4 by 0.1: {' '.join(shares)}", flush=True)


def speeds(texts: list[str], evals: Path | None) -> None:
    print("Work on each document")
    for size in (5, 13):
        speed(f"hashes of {size}-grams", texts, lambda part, n=size: [list(ngram_hashes(text, n)) for text in part])
    for mode in ("exact", "near"):
        speed(f"signing, --dedup {mode}", texts, Signer(mode).sign)
    if evals is None:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(evals)
    from lightlm.evaluate.tasks.examples import scored_examples

    started = time.process_time()
    examples = scored_examples(TASKS)
    print(f"  reading {len(TASKS)} evaluation sets: {time.process_time() - started:.1f} s")
    started = time.process_time()
    sets = Decontaminator(examples)
    counts = sets.coverage.values()
    print(f"  indexing {sum(count['examples'] for count in counts):,} examples: {time.process_time() - started:.1f} s")
    print(f"  too short to search for: { {name: count['too_short'] for name, count in sets.coverage.items()} }")
    speed("decontaminating", texts, lambda part: [sets.found_in(text) for text in part])


def memory(documents: int) -> None:
    print(f"Deciding in order, {documents:,} documents without duplicates, 4,000 at a time")
    rng = np.random.default_rng(0)
    for mode, columns in (("exact", 1), ("near", 1 + BANDS)):
        before, deduplicator, seconds = peak(), Deduplicator(mode), 0.0
        for _ in range(0, documents, 4_000):
            signatures = rng.integers(0, 2**64, (4_000, columns), np.uint64)
            started = time.process_time()
            deduplicator.decide(signatures)
            seconds += time.process_time() - started
        print(
            f"  --dedup {mode}: {seconds / documents * 1e6:.1f} us and {deduplicator.nbytes / documents:.1f} bytes "
            f"per document, peak {(peak() - before) / 1e6:,.0f} MB more",
            flush=True,
        )


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--evals", type=Path)
    parser.add_argument("--documents", type=parse_quantity, default=10_000_000)
    arguments = parser.parse_args()
    memory(arguments.documents)
    if arguments.corpus is not None:
        corpus = read(arguments.corpus)
        compare_libraries(corpus)
        speeds(corpus, arguments.evals)
