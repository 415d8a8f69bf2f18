"""Generation speed, memory and perplexity of LightLM and other programs, on the same weights.

    python benchmarks/generate.py SmolLM2-135M --text heldout.txt --out benchmarks/results/generate-smollm2-cpu.json

Each program runs in a process of its own. In each round, all continue the same prompts greedily, one program after the
other, so that a busy moment of the machine slows all alike. A prompt is timed twice, with one new token (prefill, which
includes it) and with --tokens more; the difference is decoding. Ratios are taken within a round, and printed as the
median with the lowest and the highest. Programs that are not installed are left out, and named.

The programs, all from PyPI: LightLM, transformers, xllamacpp (llama.cpp), openvino-genai, onnxruntime-genai (with onnx
and onnx_ir), and ctranslate2. Weights are converted once, in --work: to GGUF by LightLM, else by the program's own
converter.
"""

import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import make_parser, write_json
from generation_engines import ENGINES, missing

from lightlm.limits import cores
from lightlm.processes import bound_spinning


@dataclass
class Contestant:
    """A program in its process, and what was measured of it."""

    name: str
    pipe: Connection
    process: Any
    prefill: dict[int, list[float]] = field(default_factory=dict)  # tokens per second, by number of sequences
    decode: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, *message: Any) -> Any:
        """Return the answer of the process; raise RuntimeError if it fails."""
        self.pipe.send(message)
        return self.answer()

    def answer(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
        if kind == "error":
            raise RuntimeError(value)
        return value


def run(name: str, model: Path, work: Path, threads: int, pipe: Connection) -> None:
    """Run one program: load the model, then answer messages."""
    try:
        engine, precision = ENGINES[name]
        loaded = engine(engine.prepare(model, work, precision), precision, threads)
        tasks: dict[str, Callable[..., Any]] = {
            "continue": lambda prompts, count: _timed(loaded.continue_greedily, prompts, count),
            "score": loaded.log_likelihood,
            "memory": lambda: _peak_memory(loaded.processes()),
        }
        pipe.send(("ready", None))
        while message := pipe.recv():
            task, *arguments = message
            pipe.send(("done", tasks[task](*arguments)))
    except EOFError:
        pass
    except Exception as error:  # any program may fail in its own way; the others go on
        pipe.send(("error", f"{type(error).__name__}: {str(error)[:300]}"))


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def _peak_memory(processes: list[int]) -> int | None:
    """Return the sum of the peaks of resident memory in bytes; None where the system does not say."""
    try:
        lines = [line for pid in processes for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def start(names: list[str], model: Path, work: Path, threads: int) -> tuple[list[Contestant], dict[str, str]]:
    """Return the programs that run, and why the others do not."""
    context = multiprocessing.get_context("spawn")
    running, absent = [], {}
    for name in names:
        if package := missing(name):
            absent[name] = f"{package} is not installed"
            continue
        started = time.perf_counter()
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(name, model, work, threads, theirs), daemon=True)
        process.start()
        theirs.close()
        contestant = Contestant(name, ours, process)
        try:  # one after the other: loading takes all cores
            contestant.answer()
        except RuntimeError as error:
            absent[name] = str(error)
            continue
        print(f"loaded {name} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        running.append(contestant)
    return running, absent


def compete(contestants: list[Contestant], options: Any, vocab_size: int, absent: dict[str, str]) -> None:
    """Let the programs continue the same prompts, round after round; the first round is not counted.

    One that fails is moved from `contestants` to `absent`, with the reason.
    """
    draw = random.Random(0)
    started = time.perf_counter()
    for round_number in range(options.rounds + 1):
        print(f"round {round_number} of {options.rounds}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for batch in options.sequences:
            # Others in each round, and two sets of them: a program may keep what it has computed of a prompt.
            short, long = (
                [[draw.randrange(vocab_size) for _ in range(options.prompt)] for _ in range(batch)] for _ in range(2)
            )
            for contestant in list(contestants):
                try:
                    first, _ = contestant.ask("continue", short, 1)
                    whole, ids = contestant.ask("continue", long, options.tokens + 1)
                    if [len(row) for row in ids] != [options.tokens + 1] * batch:
                        raise RuntimeError(f"it gave {[len(row) for row in ids]} tokens")
                except RuntimeError as error:
                    absent[contestant.name] = str(error)
                    contestants.remove(contestant)
                    continue
                if round_number:
                    contestant.prefill.setdefault(batch, []).append(batch * options.prompt / first)
                    contestant.decode.setdefault(batch, []).append(batch * options.tokens / (whole - first))


def score(contestants: list[Contestant], ids: list[int], window: int) -> None:
    """Note each program's perplexity on a text, in windows without overlap."""
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    count = sum(len(part) - 1 for part in windows)
    for contestant in contestants:
        sums = [contestant.ask("score", part) for part in windows]
        told = None not in sums
        contestant.facts["perplexity"] = round(math.exp(-sum(sums) / count), 3) if told and count else None


def _spread(values: list[float], digits: int = 2) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
    }


def summary(contestants: list[Contestant], baseline: str) -> dict[str, Any]:
    """Return speeds, and their ratios to the baseline's in the same round."""
    [base] = [contestant for contestant in contestants if contestant.name == baseline]
    result: dict[str, Any] = {}
    for contestant in contestants:
        entry: dict[str, Any] = dict(contestant.facts)
        for batch, decode in contestant.decode.items():
            prefill = contestant.prefill[batch]
            entry[f"{batch}"] = {
                "prefill": _spread(prefill, 1),
                "decode": _spread(decode, 1),
                "prefill_ratio": _spread([a / b for a, b in zip(prefill, base.prefill[batch], strict=True)]),
                "decode_ratio": _spread([a / b for a, b in zip(decode, base.decode[batch], strict=True)]),
            }
        result[contestant.name] = entry
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    batches = result["sequences"]
    titles = ["program and weights"]
    for batch in batches:
        titles += [f"prefill, {batch} seq.", f"decode, {batch} seq.", "ratio (lowest to highest)"]
    lines = [[*titles, "peak memory, GB", "perplexity"], ["---", *["---:"] * (len(titles) + 1)]]
    for name, entry in result["programs"].items():
        row = [name]
        for batch in batches:
            measured = entry[f"{batch}"]
            ratio = measured["decode_ratio"]
            row += [f"{measured['prefill']['median']:,.0f}", f"{measured['decode']['median']:.1f}"]
            row += [f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"]
        perplexity = entry.get("perplexity")
        memory = entry.get("peak_memory_gb") or 0
        lines.append([*row, f"{memory:.2f}" if memory else "-", f"{perplexity:.2f}" if perplexity else "-"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="decoded together")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, drawn at random")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of each program; all cores unless given")
    parser.add_argument("--text", type=Path, help="text for the perplexity; without one it is left out")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--programs", default=",".join(ENGINES), help="names, with commas between them")
    parser.add_argument("--baseline", default="transformers float32", help="the program that ratios are taken to")
    parser.add_argument("--work", type=Path, help="folder for converted weights; a temporary one unless given")
    parser.add_argument("--out", type=Path, help="write the result as JSON, and the table beside it as Markdown")
    options = parser.parse_args()
    names = options.programs.split(",")
    if unknown := [name for name in (*names, options.baseline) if name not in ENGINES]:
        parser.error(f"unknown programs: {', '.join(unknown)}; known: {', '.join(ENGINES)}")
    if options.baseline not in names or missing(options.baseline):
        parser.error(f"--baseline {options.baseline} must be among --programs, and installed")
    threads = options.threads or cores()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for programs that take no number, in processes of their own
    bound_spinning()
    from lightlm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.read(options.model)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        contestants, absent = start(names, options.model, work, threads)
        compete(contestants, options, tokenizer.vocab_size, absent)
        for name, reason in absent.items():
            print(f"left out {name}: {reason}", file=sys.stderr)
        for contestant in contestants:
            contestant.facts["peak_memory_gb"] = round((contestant.ask("memory") or 0) / 1e9, 3)
        if options.text:
            text = options.text.read_text(encoding="utf-8")
            score(contestants, tokenizer.encode(text)[: options.text_tokens], window=256)
        programs = summary(contestants, options.baseline)
        for contestant in contestants:
            contestant.pipe.close()
            contestant.process.join(10)
            contestant.process.kill()
    from measure import machine_facts

    packages = sorted({engine.package.replace("_", "-") for engine, _ in ENGINES.values()} - {"lightlm"})
    result = {
        "model": options.model.name,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "sequences": options.sequences,
        "rounds": options.rounds,
        "threads": threads,
        "baseline": options.baseline,
        **machine_facts(None, *packages),
        "programs": programs,
        "left_out": absent,
    }
    text = table(result)
    print(f"{result['machine']}, {threads} threads")
    print(f"prompts of {options.prompt} tokens, {options.tokens} decoded; tokens/s of all sequences together, medians")
    print(f"of {options.rounds} rounds; ratios of decoding to {options.baseline}\n\n{text}")
    write_json(result, options.out)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
