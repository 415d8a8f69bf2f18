"""Prompts in, text out: a decoding batch whose rows end at stop strings and may go past the context."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import Batch, FinishReason, NewToken, Request
from lightlm.generate.prompts import newest
from lightlm.generate.sampling.draw import LogProbs
from lightlm.generate.settings import DEFAULTS, Settings
from lightlm.generate.text import TextStream


@dataclass(frozen=True)
class Question:
    """A prompt and how to answer it.

    Args:
        ids: the prompt's tokens, which the model's context holds.
        sample: its number; answers with other numbers differ, and none depends on how many there are.
        logprobs: 0, or of how many most likely tokens each step tells the log-probability.
    """

    ids: Sequence[int]
    settings: Settings = DEFAULTS
    sample: int = 0
    logprobs: int = 0


@dataclass
class Answer:
    """A finished answer.

    `ids` are all tokens drawn, except an end-of-text token. Those of a stop string are among them, unlike its text.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop: str | None = None  # the stop string that ended it
    log_probs: list[LogProbs] = field(default_factory=list)  # per token, if the question asks for them


@dataclass(frozen=True)
class TextToken:
    """A token of an answer, and how many characters of the answer come before its text."""

    id: int
    offset: int
    log_probs: LogProbs | None = None  # if the question asks for them


@dataclass(frozen=True)
class Piece:
    """What a step adds to the text of one row, which may be nothing; at the end also the whole answer.

    `tokens` are those whose text begins here. Those whose text belongs to a stop string are in no piece.
    """

    handle: int
    text: str
    tokens: tuple[TextToken, ...] = ()
    answer: Answer | None = None


@dataclass
class _Row:
    handle: int
    request: Request  # what the batch continues at the moment
    settings: Settings
    stream: TextStream
    answer: Answer = field(default_factory=Answer)
    begin: int = 0  # how many tokens of the answer the request's prompt holds
    windows: int = 1
    untold: list[TextToken] = field(default_factory=list)  # their text waits, see `TextStream`

    def push(self, token: NewToken) -> str:
        """Add a token to the answer and return the text that it completes."""
        self.answer.ids.append(token.id)
        self.answer.log_probs += [token.log_probs] if token.log_probs is not None else []
        self.untold.append(TextToken(token.id, self.stream.decoded, token.log_probs))
        return self.stream.push(token.id)

    def tell(self, *, ended: bool) -> tuple[TextToken, ...]:
        """Return the tokens that begin in the text so far, each once; at an end without a stop string also the rest."""
        end = len(self.answer.text)
        everything = ended and self.answer.stop is None
        told = [token for token in self.untold if everything or token.offset < end]
        self.untold = self.untold[len(told) :]
        return tuple(told)


class TextBatch:
    """Answer questions in a batch; they join and leave at any step, as in `Batch`.

    answers = TextBatch(Batch(model, max_rows=8, vocab_size=tokenizer.vocab_size), tokenizer)
    answers.join([Question(encode_prompt(tokenizer, "Once"), Settings(stop=("\\n",)))])
    while answers:
        for piece in answers.step():
            print(piece.text, end="")
    """

    def __init__(self, batch: Batch, tokenizer: Tokenizer) -> None:
        self._batch, self._tokenizer = batch, tokenizer
        self._rows: dict[int, _Row] = {}  # by the batch's handle
        self._handles = 0

    def __len__(self) -> int:
        """The number of questions without a whole answer."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """How many questions may join now."""
        return self._batch.free

    def join(self, questions: Sequence[Question]) -> list[int]:
        """Add questions and return a handle for each. Equal prompts are read once. Errors are those of `Batch.join`."""
        rows: list[_Row] = []
        for question in questions:
            settings, stops = question.settings, self._tokenizer.end_ids
            request = Request(
                question.ids,
                settings.max_new_tokens,
                settings.sampling,
                settings.seed,
                question.sample,
                stops,
                question.logprobs,
            )
            stream = TextStream(
                self._tokenizer, question.ids, settings.stop, free_tokens=settings.sampling.min_new_tokens
            )
            rows.append(_Row(self._handles + len(rows), request, settings, stream))
        inner = self._batch.join([row.request for row in rows])
        self._rows |= zip(inner, rows, strict=True)
        self._handles += len(rows)
        return [row.handle for row in rows]

    def leave(self, handle: int) -> None:
        """Free a row at once. A handle whose answer is whole, or that never was, is ignored."""
        for inner, row in self._rows.items():
            if row.handle == handle:
                self._batch.leave(inner)
                del self._rows[inner]
                return

    def step(self) -> list[Piece]:
        """Draw the next token of each row, and return what that adds to the texts."""
        pieces = []
        for token in self._batch.step():
            row = self._rows[token.handle]
            answer, reason = row.answer, token.finish_reason
            text = ""
            if reason != "stop":
                text = row.push(token)
            if row.stream.stop is not None:
                self._batch.leave(token.handle)
                reason = "stop"
            elif reason == "context" and row.settings.sliding_window:
                self._slide(token.handle)
                reason = None
            if reason is not None:
                text += row.stream.flush()
                answer.stop = row.stream.stop
                answer.finish_reason = reason if answer.stop is None else "stop"
                self._rows.pop(token.handle)
            answer.text += text
            ended = reason is not None
            pieces.append(Piece(row.handle, text, row.tell(ended=ended), answer if ended else None))
        return pieces

    def _slide(self, handle: int) -> None:
        """Continue a row whose context is full: read the newest half of the context anew.

        Penalties and bans of repetition see only what is read anew.
        """
        row = self._rows.pop(handle)
        seen = [*row.request.ids, *row.answer.ids[row.begin :]]
        made = len(row.answer.ids)
        sampling = row.settings.sampling
        row.request = replace(
            row.request,
            ids=newest(self._tokenizer, seen, max(self._batch.model.config.max_seq_len // 2, 1)),
            max_new_tokens=row.settings.max_new_tokens - made,
            sampling=replace(sampling, min_new_tokens=max(sampling.min_new_tokens - made, 0)),
            # Another generator: the first one would repeat its draws.
            seed=row.settings.seed + row.windows * 2**32,
        )
        row.begin, row.windows = made, row.windows + 1
        [inner] = self._batch.join([row.request])
        self._rows[inner] = row
