"""The decoding loop: one thread that runs the model for all requests, and the queue before it.

A request consists of choices. Each is one row of the `TextBatch`, which it joins as soon as a row is free and leaves at
its end, or when its client has gone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import Batch
from lightlm.generate.text_batch import Piece, Question, TextBatch
from lightlm.model.transformer import Transformer
from lightlm.serve.answers import finish_reason
from lightlm.serve.errors import RequestError
from lightlm.serve.metrics import Metrics

_PREFILL_TOKENS = 256  # of new prompts per step, while other rows wait for their next token
_LOG = logging.getLogger("lightlm")

Deliver = Callable[[int, Piece | RequestError], None]


@dataclass(frozen=True)
class Limits:
    """What a server does at most.

    Args:
        rows: choices decoded at a time.
        waiting: choices in the queue.
        seconds: from a request to the end of its answer.
    """

    rows: int = 8
    waiting: int = 64
    seconds: float = 600.0

    @property
    def choices(self) -> int:
        """Choices that the server holds at a time, so that one request may have."""
        return self.rows + self.waiting


@dataclass(eq=False)
class _Choice:
    """One row of a request, from its arrival to its end."""

    index: int
    question: Question
    deliver: Deliver
    arrived: float
    handle: int | None = None  # in the batch, once it has joined
    cancelled: bool = False
    started: bool = False  # whether it has its first token


class Job:
    """The choices of one request; `DecodeLoop.cancel` takes it."""

    def __init__(self, choices: list[_Choice]) -> None:
        self._choices = choices


class DecodeLoop:
    """The thread that decodes. Any thread may call the public methods.

    Args:
        model: in evaluation mode; only the decoding thread uses it.
        tokenizer: ids beyond it are never drawn.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self.limits, self._model, self._tokenizer, self._metrics = limits, model, tokenizer, metrics
        self._batch = self._new_batch()
        self._running: dict[int, _Choice] = {}  # by handle; only the decoding thread changes it
        self._changed = threading.Condition()  # held to change what follows
        self._waiting: deque[_Choice] = deque()
        self._accepting, self._ending = True, False
        self._thread = threading.Thread(target=self._run, name="lightlm-decode", daemon=True)
        metrics.watch("lightlm_rows", lambda: limits.rows)
        metrics.watch("lightlm_rows_used", lambda: len(self._running))
        metrics.watch("lightlm_rows_waiting", lambda: len(self._waiting))

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting and self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether choices wait or are being decoded."""
        return bool(self._running or self._waiting)

    def start(self) -> None:
        self._thread.start()

    def submit(self, questions: Sequence[Question], deliver: Deliver) -> Job:
        """Queue the choices of a request.

        Args:
            deliver: called from the decoding thread as deliver(index, piece) with each part of a choice, and with a
                RequestError in place of the last part if the choice fails.

        Raises:
            RequestError: the queue is full, or the server stops.
        """
        now = time.monotonic()
        rows = [_Choice(i, question, deliver, now) for i, question in enumerate(questions)]
        with self._changed:
            if not self._accepting:
                raise _stopping()
            if len(self._waiting) + len(self._running) + len(rows) > self.limits.choices:
                message = f"the server is busy: {len(self._running)} answers are decoded and {len(self._waiting)} wait"
                raise RequestError(f"{message}; try again later", 429, code="queue_full", retry_after="1")
            self._waiting.extend(rows)
            self._changed.notify()
        return Job(rows)

    def cancel(self, job: Job) -> None:
        """Free the rows of a request whose answer nobody waits for; those that have ended stay as they are."""
        with self._changed:
            for choice in job._choices:
                choice.cancelled = True
            self._changed.notify()

    def refuse(self) -> None:
        """Accept no more requests, and end those that have not begun."""
        with self._changed:
            self._accepting = False
            dropped, self._waiting = list(self._waiting), deque()
        for choice in dropped:
            self._end(choice, "shutdown", _stopping())

    def end(self) -> None:
        """End all choices and the thread, after the current step."""
        self.refuse()
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _new_batch(self) -> TextBatch:
        inner = Batch(self._model, self.limits.rows, _PREFILL_TOKENS, self._tokenizer.vocab_size)
        return TextBatch(inner, self._tokenizer)

    def _run(self) -> None:
        while self._await_work():
            try:
                self._drop()
                self._join()
                self._step()
            except Exception as error:  # of one step, such as a device out of memory; the next requests may fit
                _LOG.exception("decoding failed; all choices end with an error")
                with self._changed:
                    failed = [*self._running.values(), *self._waiting]
                    self._running, self._waiting, self._batch = {}, deque(), self._new_batch()
                for choice in failed:
                    self._end(choice, "error", RequestError(f"decoding failed: {type(error).__name__}", 500))
        for choice in self._running.values():
            self._end(choice, "shutdown", _stopping())
        self._running = {}

    def _await_work(self) -> bool:
        """Wait until there is something to do; False says that the loop ends."""
        with self._changed:
            while not (self._ending or self._running or self._waiting):
                self._changed.wait()
            return not self._ending

    def _drop(self) -> None:
        """Let choices go whose client has gone, or whose time is over."""
        late = time.monotonic() - self.limits.seconds
        with self._changed:
            waiting = self._waiting
            gone = [choice for choice in waiting if choice.cancelled or choice.arrived < late]
            if gone:
                self._waiting = deque(choice for choice in waiting if choice not in gone)
        for choice in [each for each in self._running.values() if each.cancelled or each.arrived < late]:
            gone.append(self._leave(choice))
        for choice in gone:
            if choice.cancelled:
                self._end(choice, "cancelled", None)
            else:
                error = RequestError(f"the answer took more than {self.limits.seconds:g} s", 504, code="timeout")
                self._end(choice, "timeout", error)

    def _join(self) -> None:
        """Let waiting choices join the batch, in their order."""
        with self._changed:
            joining = list(islice(self._waiting, self._batch.free))
            # In the same moment, so that `busy` and the limit of `submit` see each choice in one place.
            for choice, handle in zip(joining, self._batch.join([choice.question for choice in joining]), strict=True):
                choice.handle = handle
                self._running[handle] = self._waiting.popleft()
        now = time.monotonic()
        for choice in joining:
            self._metrics.add("lightlm_prompt_tokens_total", len(choice.question.ids))
            self._metrics.add("lightlm_queue_seconds", now - choice.arrived)

    def _step(self) -> None:
        started = time.monotonic()
        pieces = self._batch.step()
        now = time.monotonic()
        self._metrics.add("lightlm_step_seconds", now - started)
        self._metrics.add("lightlm_generated_tokens_total", len(pieces))
        for piece in pieces:
            choice = self._running[piece.handle]
            if not choice.started:
                choice.started = True
                self._metrics.add("lightlm_first_token_seconds", now - choice.arrived)
            if piece.answer is not None:
                self._end(self._leave(choice), finish_reason(piece.answer), piece)
            elif piece.text:
                choice.deliver(choice.index, piece)

    def _leave(self, choice: _Choice) -> _Choice:
        assert choice.handle is not None
        self._batch.leave(choice.handle)
        del self._running[choice.handle]
        return choice

    def _end(self, choice: _Choice, reason: str, last: Piece | RequestError | None) -> None:
        self._metrics.add("lightlm_choices_total", 1, reason)
        self._metrics.add("lightlm_choice_seconds", time.monotonic() - choice.arrived)
        if last is not None:
            choice.deliver(choice.index, last)


def _stopping() -> RequestError:
    return RequestError("the server is shutting down", 503, code="shutting_down", retry_after="5")
