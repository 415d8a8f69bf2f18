"""Answer one prompt, once or several times; the first answer streams to standard output."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer

from lightlm.checkpoint import LoadedModel
from lightlm.cli.console import console, print_json, reader_left
from lightlm.data.tokenizer import Tokenizer, token_text
from lightlm.generate.batch import Batch
from lightlm.generate.beams import beam_search
from lightlm.generate.settings import Settings
from lightlm.generate.speculation import Speculation
from lightlm.generate.text import TextStream
from lightlm.generate.text_batch import Answer, Question, TextBatch


@dataclass(frozen=True)
class Beams:
    """How wide beam search is, and how it weighs lengths (see `beam_search`)."""

    count: int
    length_penalty: float


def write(text: str) -> None:
    """Show a part of a text at once, unchanged: rich would read [brackets] in it as markup.

    Raises:
        typer.Exit: nobody reads it anymore, as behind `| head`.
    """
    sys.stdout.write(text)
    sys.stdout.flush()
    if reader_left():
        raise typer.Exit


def answer(
    loaded: LoadedModel,
    questions: Sequence[Question],
    show: Callable[[str], None],
    speculation: Speculation | None = None,
) -> list[Answer]:
    """Return the answers to questions; `show` receives the text of the first as it comes."""
    tokenizer = loaded.tokenizer
    inner = Batch(loaded.model, len(questions), vocab_size=tokenizer.vocab_size, speculation=speculation)
    batch = TextBatch(inner, tokenizer)
    handles = batch.join(questions)
    answers: dict[int, Answer] = {}
    while batch:
        for piece in batch.step():
            if piece.handle == handles[0]:
                show(piece.text)
            if piece.answer is not None:
                answers[piece.handle] = piece.answer
    return [answers[handle] for handle in handles]


def search(loaded: LoadedModel, ids: list[int], settings: Settings, beams: Beams) -> list[tuple[Answer, float]]:
    """Return the answers that beam search finds, the best first, and their scores.

    A stop string cuts an answer that is found; it does not end the search.
    """
    tokenizer, sampling = loaded.tokenizer, settings.sampling
    found = beam_search(
        loaded.model,
        ids,
        beams.count,
        settings.max_new_tokens,
        sampling,
        beams.length_penalty,
        tokenizer.end_ids,
        tokenizer.vocab_size,
    )
    answers = []
    for beam in found:
        stream = TextStream(tokenizer, ids, settings.stop, free_tokens=sampling.min_new_tokens)
        text = "".join([*map(stream.push, beam.ids), stream.flush()])
        reason = beam.finish_reason if stream.stop is None else "stop"
        answers.append((Answer(text, beam.ids, reason, stream.stop), beam.score))
    return answers


def speed(tokens: int, seconds: float, speculation: Speculation | None = None) -> str:
    """Return how many tokens took how long, and how many guesses of a speculation were right, for people."""
    guesses = ""
    if speculation is not None:
        kept, guessed = speculation.take_counts()
        guesses = f"; {kept:,} of {guessed:,} guesses were right"
    return f"{tokens:,} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s{guesses}"


@dataclass(frozen=True)
class Single:
    """One prompt to answer.

    Args:
        prompt: its text, which is shown before each answer that continues it.
        messages: the conversation that the prompt ends, if it is one; then only answers are shown.
        suggested: sampling settings that the model's files suggest, for --json.
        speculation: guesses tokens; None guesses none.
        beams: search in place of drawing; None draws.
    """

    loaded: LoadedModel
    prompt: str
    ids: list[int]
    settings: Settings
    messages: list[dict[str, Any]] | None = None
    suggested: dict[str, Any] | None = None
    speculation: Speculation | None = None
    beams: Beams | None = None

    def run(self, num_samples: int, *, as_json: bool, logprobs: int = 0) -> None:
        """Answer the prompt so many times and print the answers."""
        before = "" if self.messages else self.prompt
        show = (lambda text: None) if as_json else write
        show(before)
        started = time.perf_counter()
        questions = [Question(self.ids, self.settings, number, logprobs) for number in range(num_samples)]
        scores: list[float] = []
        try:
            if self.beams is None:
                answers = answer(self.loaded, questions, show, self.speculation)
            else:
                found = search(self.loaded, self.ids, self.settings, self.beams)[:num_samples]
                answers, scores = [each for each, _ in found], [score for _, score in found]
                show(answers[0].text)
        except KeyboardInterrupt:
            show("\n")
            raise
        seconds = time.perf_counter() - started
        show("\n")
        for each in answers[1:]:
            show(f"\n---\n{before}{each.text}\n")
        if as_json:
            print_json(self._document(answers, scores))
        for number, each in enumerate(answers, 1):
            if each.finish_reason == "context":
                context = self.loaded.model.config.max_seq_len
                console.print(
                    f"Sample {number} ended early: the model's context of {context:,} tokens is full. "
                    "--sliding-window continues without the oldest half."
                )
        tokens = sum(len(each.ids) for each in answers)
        console.print(f"[dim]{speed(tokens, seconds, self.speculation)}[/]")

    def _document(self, answers: list[Answer], scores: list[float]) -> dict[str, Any]:
        document: dict[str, Any] = {
            "model": self.loaded.name,
            "path": str(self.loaded.path),
            "prompt": self.prompt,
            "prompt_tokens": len(self.ids),
        }
        if self.messages:
            document["messages"] = self.messages
        document |= {"seed": self.settings.seed, "sampling": asdict(self.settings.sampling)}
        if self.suggested:
            document["suggested_by_model"] = self.suggested
        if self.beams:
            document["beams"] = asdict(self.beams)
        document["samples"] = [
            {"text": each.text, "ids": each.ids, "finish_reason": each.finish_reason, "stop": each.stop}
            | ({"logprobs": _log_probs(self.loaded.tokenizer, each)} if each.log_probs else {})
            for each in answers
        ]
        if self.beams:
            for sample, score in zip(document["samples"], scores, strict=True):
                sample["score"] = score
        return document


def _log_probs(tokenizer: Tokenizer, answer: Answer) -> list[dict[str, Any]]:
    """Return each token with its log-probability and the most likely tokens at its place, named as in OpenAI's API."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": token_text(tokenizer.bytes_of(token)), "logprob": logprob}

    return [
        entry(token, found.chosen) | {"top_logprobs": [entry(*pair) for pair in found.top]}
        for token, found in zip(answer.ids, answer.log_probs, strict=True)
    ]
