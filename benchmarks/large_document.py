"""The peak memory of preparing one text file of hundreds of megabytes.

python benchmarks/large_document.py CORPUS --tokenizer tokenizer.json [--megabytes 500] [--out FILE]

CORPUS holds .parquet files with a column `text`; the file repeats its texts. Preparation runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def make(corpus: Path, path: Path, size: int) -> None:
    """Write a text file of `size` bytes."""
    import pyarrow.parquet as parquet

    texts = parquet.read_table(sorted(corpus.glob("*.parquet"))[0], columns=["text"])["text"].to_pylist()
    raw = "".join(texts).encode()
    path.write_text((raw * (size // len(raw) + 1))[:size].decode("utf-8", "ignore"), encoding="utf-8")


def measure(source: Path, tokenizer: Path) -> None:
    """Prepare it; print the process's peak in megabytes and a checksum of the train split."""
    import resource

    from lightlm.data.prepare.run import prepare

    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        made = prepare(str(source), str(tokenizer), Path(out) / "data")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"peak_mb": round(peak / 1e6), "train_xxh3": made.shards[0].xxh3}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's tokenizer.json")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "measure":
        measure(arguments.corpus, arguments.tokenizer)
    elif arguments.step:
        make(arguments.corpus, Path(arguments.step), arguments.megabytes * 10**6)
    else:  # this process stays small: a child's peak is at least its parent's
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "document.txt"
            command = [sys.executable, __file__, "--tokenizer", str(arguments.tokenizer)]
            size = ["--megabytes", str(arguments.megabytes)]
            subprocess.run([*command, str(arguments.corpus), *size, "--step", str(path)], check=True)
            trial = [*command, str(path), "--step", "measure"]
            figures = json.loads(subprocess.run(trial, capture_output=True, text=True, check=True).stdout)
        figures["megabytes"] = arguments.megabytes
        print(figures)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
