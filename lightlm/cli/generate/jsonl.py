"""`lightlm generate --jsonl IN --out OUT`: answer a file of prompts, and resume where an interrupted command stopped.

A finished answer is one line of OUT, appended at once. A line carries a hash of what it answers, so the same command
finds what is done. At the end the lines are sorted into the order of IN.
"""

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightlm import files
from lightlm.checkpoint import LoadedModel
from lightlm.cli.console import console
from lightlm.cli.generate.rows import Row, refuse
from lightlm.cli.generate.single import speed
from lightlm.errors import DataError, LightLMError
from lightlm.generate.batch import Batch
from lightlm.generate.prompts import PromptReader
from lightlm.generate.text_batch import Question, TextBatch

_LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


@dataclass(frozen=True)
class _Task:
    """An answer to write: one sample of a row."""

    row: Row
    question: Question
    key: str

    @property
    def place(self) -> tuple[int, int]:
        return self.row.line, self.question.sample

    @property
    def head(self) -> dict[str, Any]:
        """The values with which its line begins, before those of the answer."""
        named = {} if self.row.id is None else {"id": self.row.id}
        return {"line": self.row.line, **named, "sample": self.question.sample, "seed": self.row.settings.seed}


def answer_rows(
    loaded: LoadedModel,
    reader: PromptReader,
    rows: Sequence[Row],
    out: Path,
    *,
    source: Path,
    num_samples: int,
    batch_size: int,
) -> dict[str, Any]:
    """Write the answers that `out` lacks, and return the facts of the work.

    Raises:
        DataError: a prompt does not fit the model, or `out` holds something else than answers to these rows.
        DiskFullError: there is no room; what is written stays.
    """
    tasks = list(_tasks(loaded, reader, rows, source, num_samples))
    lines = _finished(out, tasks)
    todo = [task for task in tasks if task.place not in lines]
    if lines and todo:
        console.print(f"Resuming: {len(lines):,} of {len(tasks):,} answers are in {out}.", markup=False, soft_wrap=True)
    started, tokens = time.perf_counter(), 0
    try:
        for task, line, count in _answers(loaded, todo, batch_size, out):
            lines[task.place] = line
            tokens += count
    except KeyboardInterrupt:
        console.print(
            f"Interrupted: {len(lines):,} of {len(tasks):,} answers are in {out}. Rerun the same command to resume.",
            markup=False,
            soft_wrap=True,
        )
        raise
    whole = b"".join(lines[place] for place in sorted(lines))
    if out.read_bytes() != whole:  # in another order, or with lines of the same command at the same time
        files.write_bytes(out, whole)
    seconds = time.perf_counter() - started
    return {"out": str(out), "answers": len(tasks), "new": len(todo), "tokens": tokens, "seconds": round(seconds, 3)}


def describe(facts: dict[str, Any]) -> str:
    """Return what `answer_rows` did, for people."""
    if not facts["new"]:
        return f"All {facts['answers']:,} answers are in {facts['out']}."
    return f"{facts['answers']:,} answers in {facts['out']}; {speed(facts['tokens'], facts['seconds'])}"


def _tasks(
    loaded: LoadedModel, reader: PromptReader, rows: Sequence[Row], source: Path, num_samples: int
) -> Iterator[_Task]:
    """Yield what to answer. Raises DataError where prompts do not fit the model; the message lists them."""
    wrong = []
    precision = [str(loaded.model.embed_tokens.weight.dtype), loaded.model.decoding_precision]
    weights = [[file.name, files.checksum(file)] for file in loaded.weights]
    model = [loaded.name, weights, *precision]
    for row in rows:
        try:
            most = row.settings.max_new_tokens
            row.settings.sampling.check_ids(loaded.tokenizer.vocab_size)
            ids = reader.read_chat(row.messages, most) if row.messages else reader.read(row.prompt or "", most)
        except LightLMError as error:
            wrong.append(f"{source}:{row.line}: {error}")
            continue
        for sample in range(num_samples):
            content = [*model, ids, asdict(row.settings), sample]
            key = xxhash.xxh3_64_hexdigest(json.dumps(content).encode())
            yield _Task(row, Question(ids, row.settings, sample), key)
    refuse(wrong)


def _finished(out: Path, tasks: Sequence[_Task]) -> dict[tuple[int, int], bytes]:
    """Return the lines of answers in `out`, and cut off one that a kill has left unfinished at its end.

    Raises:
        DataError: a line answers something else, or the end of the file is not the beginning of an answer.
    """
    keys = {task.place: task.key for task in tasks}
    try:
        content = out.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"--out {out} cannot be read: {error.strerror}") from None
    whole = content[: content.rfind(b"\n") + 1]
    lines: dict[tuple[int, int], bytes] = {}
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            values = json.loads(line)
            place, key = (values["line"], values["sample"]), values["key"]
            expected = keys.get(place)
        except (ValueError, KeyError, TypeError):
            raise _foreign(out, number) from None
        if key != expected:
            raise DataError(
                f"{out}:{number} answers another prompt, or with another model, precision or settings; delete the "
                "file, or choose another with --out"
            )
        lines.setdefault(place, line)
    if torn := content[len(whole) :]:
        if not any(_may_begin(torn, task) for task in tasks):
            raise _foreign(out, whole.count(b"\n") + 1)
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return lines


def _may_begin(torn: bytes, task: _Task) -> bool:
    """Return whether a line without its end may be one of the task."""
    head = json.dumps(task.head, ensure_ascii=False).encode().removesuffix(b"}") + b", "
    return torn.startswith(head) or head.startswith(torn)


def _foreign(out: Path, number: int) -> DataError:
    return DataError(f"{out}:{number} is not an answer of this command; choose another file with --out")


def _answers(
    loaded: LoadedModel, todo: Sequence[_Task], batch_size: int, out: Path
) -> Iterator[tuple[_Task, bytes, int]]:
    """Answer tasks, long prompts first, and append each answer to `out` as it is finished; yield it and its length."""
    tokenizer = loaded.tokenizer
    waiting = deque(sorted(todo, key=lambda task: -len(task.question.ids)))
    batch = TextBatch(Batch(loaded.model, min(batch_size, len(todo) or 1), vocab_size=tokenizer.vocab_size), tokenizer)
    running: dict[int, _Task] = {}
    with files.writing(out), out.open("ab", buffering=0) as file, _Progress(len(todo)) as progress:
        while waiting or batch:
            joining = [waiting.popleft() for _ in range(min(batch.free, len(waiting)))]
            if joining:
                running |= zip(batch.join([task.question for task in joining]), joining, strict=True)
            for piece in batch.step():
                if piece.answer is None:
                    continue
                task = running.pop(piece.handle)
                count = len(piece.answer.ids)
                values = task.head | {"text": piece.answer.text, "finish_reason": piece.answer.finish_reason}
                values |= {"stop": piece.answer.stop, "prompt_tokens": len(task.question.ids)}
                values |= {"tokens": count, "key": task.key}
                line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                progress.advance(count)
                yield task, line, count


class _Progress:
    """A bar on a terminal, else a line each minute."""

    def __init__(self, total: int) -> None:
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("answering", total=total, speed="")
        self._total, self._done, self._tokens = total, 0, 0
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, tokens: int) -> None:
        self._done += 1
        self._tokens += tokens
        now = time.monotonic()
        rate = f"{self._tokens / max(now - self._began, 1e-9):,.0f} tokens/s"
        self._bar.update(self._task, advance=1, speed=rate)
        if not console.is_terminal and now - self._printed >= _LINE_SECONDS:
            self._printed = now
            console.print(f"{self._done:,} of {self._total:,} answers, {rate}", markup=False)
