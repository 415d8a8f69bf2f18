"""Answer one prompt, once or several times; the first answer streams to standard output."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightlm.checkpoint import LoadedModel
from lightlm.cli.console import console, print_json
from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import Batch
from lightlm.generate.settings import Settings
from lightlm.generate.text_batch import Answer, Question, TextBatch


def write(text: str) -> None:
    """Show a part of a text at once, unchanged: rich would read [brackets] in it as markup."""
    sys.stdout.write(text)
    sys.stdout.flush()


def answer(loaded: LoadedModel, questions: Sequence[Question], show: Callable[[str], None]) -> list[Answer]:
    """Return the answers to questions; `show` receives the text of the first as it comes."""
    tokenizer = loaded.tokenizer
    batch = TextBatch(Batch(loaded.model, len(questions), vocab_size=tokenizer.vocab_size), tokenizer)
    handles = batch.join(questions)
    answers: dict[int, Answer] = {}
    while batch:
        for piece in batch.step():
            if piece.handle == handles[0]:
                show(piece.text)
            if piece.answer is not None:
                answers[piece.handle] = piece.answer
    return [answers[handle] for handle in handles]


def speed(tokens: int, seconds: float) -> str:
    """Return how many tokens took how long, for people."""
    return f"{tokens:,} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s"


@dataclass(frozen=True)
class Single:
    """One prompt to answer.

    Args:
        prompt: its text, which is shown before each answer that continues it.
        messages: the conversation that the prompt ends, if it is one; then only answers are shown.
        suggested: sampling settings that the model's files suggest, for --json.
    """

    loaded: LoadedModel
    prompt: str
    ids: list[int]
    settings: Settings
    messages: list[dict[str, Any]] | None = None
    suggested: dict[str, Any] | None = None

    def run(self, num_samples: int, *, as_json: bool, logprobs: int = 0) -> None:
        """Answer the prompt so many times and print the answers."""
        before = "" if self.messages else self.prompt
        show = (lambda text: None) if as_json else write
        show(before)
        started = time.perf_counter()
        questions = [Question(self.ids, self.settings, number, logprobs) for number in range(num_samples)]
        try:
            answers = answer(self.loaded, questions, show)
        except KeyboardInterrupt:
            show("\n")
            raise
        seconds = time.perf_counter() - started
        show("\n")
        for each in answers[1:]:
            show(f"\n---\n{before}{each.text}\n")
        if as_json:
            print_json(self._document(answers))
        for number, each in enumerate(answers, 1):
            if each.finish_reason == "context":
                context = self.loaded.model.config.max_seq_len
                console.print(
                    f"Sample {number} ended early: the model's context of {context:,} tokens is full. "
                    "--sliding-window continues without the oldest half."
                )
        console.print(f"[dim]{speed(sum(len(each.ids) for each in answers), seconds)}[/]")

    def _document(self, answers: list[Answer]) -> dict[str, Any]:
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
        document["samples"] = [
            {"text": each.text, "ids": each.ids, "finish_reason": each.finish_reason, "stop": each.stop}
            | ({"logprobs": _log_probs(self.loaded.tokenizer, each)} if each.log_probs else {})
            for each in answers
        ]
        return document


def _log_probs(tokenizer: Tokenizer, answer: Answer) -> list[dict[str, Any]]:
    """Return each token with its log-probability and the most likely tokens at its place, named as in OpenAI's API."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.special_tokens.get(token) or tokenizer.decode([token])
        return {"id": token, "token": text, "logprob": logprob}

    return [
        entry(token, found.chosen) | {"top_logprobs": [entry(*pair) for pair in found.top]}
        for token, found in zip(answer.ids, answer.log_probs, strict=True)
    ]
