"""Continuous batching: rows of one decoding loop that join and leave at any step.

A batch holds a cache with one row per running request. A step reads prompt tokens of requests that joined, computes one
token of each running row, and draws the next token of every row. What a row gets does not depend on the others: its
draws come from its own generator, and logits differ by rounding only.

Memory: a full cache grows by half, to at most `max_rows` rows of as many slots as the requests in it may use. While it
grows, the old one exists beside it. Prompts are read in pieces of at most `_PIECE` tokens, into a cache of their own,
which is then copied. Without requests, the memory is free.

Shapes: B rows, T positions of a piece, V vocabulary.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightlm.errors import LightLMError, UsageError
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.sampling.draw import LogProbs, Row, log_probs, sample
from lightlm.generate.speculation import Speculation
from lightlm.generate.step.fast import FastForward, forward_of
from lightlm.model.config import ModelConfig
from lightlm.model.decoding.cache import KVCache
from lightlm.model.transformer import Transformer

# A stop token (or the caller, as in `generate`), `max_new_tokens`, or a full context ended the row.
FinishReason = Literal["stop", "length", "context"]
_PIECE = 2048  # most tokens in a forward pass that reads prompts, padding included


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        ids: the prompt's tokens, at least one.
        max_new_tokens: where the continuation ends at the latest.
        seed, sample: the row draws from its own generator, seeded with both. So the samples 0, 1, 2, ... of one seed
            differ, and none depends on how many there are.
        stop_ids: tokens that end the continuation, usually end-of-text.
        logprobs: 0, or of how many most likely tokens each step tells the log-probability.

    Raises:
        LightLMError: the prompt has no tokens.
        UsageError: max_new_tokens is below 1 or the sampling's min_new_tokens.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = DEFAULT
    seed: int = 1337
    sample: int = 0
    stop_ids: Collection[int] = ()
    logprobs: int = 0

    def __post_init__(self) -> None:
        self.sampling.check_most(self.max_new_tokens)
        if not self.ids:
            raise LightLMError("a prompt has no tokens; start from the end-of-text token instead")

    def check(self, config: ModelConfig) -> None:
        """Raise LightLMError if the prompt is longer than the model's context, or has an id that it has no row for."""
        if len(self.ids) > config.max_seq_len:
            raise LightLMError(
                f"the prompt has {len(self.ids):,} tokens, the model's context holds {config.max_seq_len:,}; "
                "shorten the prompt"
            )
        if (highest := max(self.ids, default=0)) >= config.vocab_size:
            raise LightLMError(
                f"the prompt has the token {highest:,}, but the model's embedding has {config.vocab_size:,} rows; "
                "leave that token out"
            )


@dataclass(frozen=True)
class NewToken:
    """A token that a step has drawn for a row.

    Args:
        handle: the row's, from `join`.
        id: the token. One that ends the row with the reason "stop" is not part of the text.
        finish_reason: why the row ended with this token, or None; its handle is then free.
        log_probs: of the token and of the most likely ones, if the request asks for them.
    """

    handle: int
    id: int
    finish_reason: FinishReason | None = None
    log_probs: LogProbs | None = None


@dataclass(frozen=True)
class _Row:
    """A request in the batch, and what its next token depends on."""

    handle: int
    request: Request
    state: Row

    @classmethod
    def of(cls, handle: int, request: Request) -> "_Row":
        generator = row_generator(request.seed, request.sample)
        return cls(handle, request, Row(request.sampling, generator, request.ids, stop_ids=request.stop_ids))


@dataclass
class _Reading:
    """Prompts that are read together, each once, with the rows that continue it."""

    prompts: list[list[int]]
    rows: list[list[_Row]]
    cache: KVCache
    done: int = 0  # positions read


class Batch:
    """Rows that are decoded together; requests join and leave at any step.

        batch = Batch(model, max_rows=8)
        [handle] = batch.join([Request(ids, max_new_tokens=20)])
        while batch:
            for token in batch.step():
                print(token.handle, token.id, token.finish_reason)

    Not safe for threads: one thread calls all methods.

    Args:
        model: in evaluation mode.
        max_rows: most requests at a time.
        prefill_tokens: how many prompt tokens a step reads while other rows wait for their next one, rounded up to
            whole prompts if they are short; None reads all prompts first, which takes the least time in total.
        vocab_size: the tokenizer's; ids at or above it are never drawn. None allows all ids of the model.
        speculation: guesses several tokens at a time while there is only one request, if that is faster. A step still
            returns one token of it.
        fast: on a CPU, compute by `step.fast`, which prepares a copy of the weights. They must not change while there
            are requests.
    """

    def __init__(
        self,
        model: Transformer,
        max_rows: int,
        prefill_tokens: int | None = None,
        vocab_size: int | None = None,
        speculation: Speculation | None = None,
        fast: bool = True,
    ) -> None:
        if max_rows < 1 or (prefill_tokens is not None and prefill_tokens < 1):
            raise UsageError(f"a batch needs at least 1 row and 1 prompt token, got {max_rows} and {prefill_tokens}")
        self.model, self.max_rows = model, max_rows
        self._prefill_tokens, self._vocab_size = prefill_tokens, vocab_size
        self._fast = fast
        self._prepared: FastForward | Transformer | None = None
        self._handles = 0
        self._waiting: deque[tuple[list[int], list[_Row]]] = deque()  # a prompt, and the rows that continue it
        self._reading: _Reading | None = None
        self._running: list[_Row] = []  # row b of the cache
        self._cache = model.new_cache(0, 0)
        self._speculation = speculation
        self._ahead: deque[tuple[int, LogProbs | None]] = deque()  # what the only row has drawn beyond this step

    def __len__(self) -> int:
        """The number of requests that are not finished."""
        return sum(1 for _ in self._rows())

    @property
    def free(self) -> int:
        """How many requests may join now."""
        return self.max_rows - len(self)

    def join(self, requests: Sequence[Request]) -> list[int]:
        """Add requests, to be read by the next steps, and return a handle for each. Equal prompts are read once.

        Raises:
            LightLMError: a prompt does not fit the model; see `Request.check`.
            UsageError: more requests than `free`, or `sampling` names an id that does not exist.
        """
        for request in requests:
            request.sampling.check_ids(self._vocab_size or self.model.config.vocab_size)
            request.check(self.model.config)
        if len(requests) > self.free:
            raise UsageError(f"{len(requests)} requests for {self.free} free rows of {self.max_rows}")
        if not self:
            self._prepared = None  # the weights may have changed
        together: dict[tuple[int, ...], list[_Row]] = {}
        handles = range(self._handles, self._handles + len(requests))
        for handle, request in zip(handles, requests, strict=True):
            together.setdefault(tuple(request.ids), []).append(_Row.of(handle, request))
        self._waiting.extend((list(ids), rows) for ids, rows in together.items())
        self._handles = handles.stop
        return list(handles)

    def leave(self, handle: int) -> None:
        """Free a row at once. A handle that has finished, or never was, is ignored."""
        for line, row in enumerate(self._running):
            if row.handle == handle:
                self._remove(line)
                return
        for rows in [rows for _, rows in self._waiting] + (self._reading.rows if self._reading else []):
            rows[:] = [row for row in rows if row.handle != handle]
        self._waiting = deque((ids, rows) for ids, rows in self._waiting if rows)
        if self._reading is not None and not any(self._reading.rows):
            self._reading = None

    @torch.no_grad()
    def step(self) -> list[NewToken]:
        """Compute and draw the next token of each row that has been read. Rows that finish leave the batch."""
        alone = len(self) == len(self._running) == 1
        if alone and not self._ahead:
            self._speculate()
        if self._ahead:
            return [self._advance(0, *self._ahead.popleft())]
        logits = [self._decode()] if self._running else []
        logits += self._prefill()
        if not logits:
            return []
        logits_BV = torch.cat(logits)
        tokens = sample(logits_BV, [row.state for row in self._running], self._vocab_size)
        if alone and self._speculation is not None:
            self._speculation.pace.note_plain()
        told = self._log_probs(logits_BV, tokens)
        lines = reversed(range(len(self._running)))  # a row that finishes moves only rows after it
        made = [self._advance(line, tokens[line], told.get(line)) for line in lines]
        return sorted(made, key=lambda token: token.handle)

    def _advance(self, line: int, token: int, told: LogProbs | None) -> NewToken:
        """Add a token to a row, which leaves if it finishes."""
        row = self._running[line]
        row.state.new.append(token)
        reason = self._finish_reason(row)
        if reason is not None:
            self._remove(line)
        return NewToken(row.handle, token, reason, told)

    def _speculate(self) -> None:
        """Guess tokens of the only row, compute all in one pass, and keep those that it draws."""
        if self._speculation is None:
            return
        [row], [length] = self._running, self._cache.lengths
        left = row.request.max_new_tokens - len(row.state.new)
        guesses = self._speculation.guess(row.state, min(left, self.model.config.max_seq_len - length) - 1)
        if not guesses:
            return
        self._make_room(length + 1 + len(guesses))
        tokens_1T = torch.tensor([[row.state.new[-1], *guesses]], device=self.model.device)
        x_1TD = self._forward.hidden_states(tokens_1T, self._cache)
        logits_TV = self._forward.head(x_1TD)[0]
        tokens = self._speculation.keep(logits_TV, guesses, row.state, self._vocab_size)
        self._cache.cut(0, length + len(tokens))
        self._speculation.follow(row.state, length, x_1TD[0, : len(tokens)])
        told: list[LogProbs] | list[None] = [None] * len(tokens)
        if row.request.logprobs:
            told = log_probs(logits_TV[: len(tokens)], tokens, row.request.logprobs, self._vocab_size)
        self._ahead.extend(zip(tokens, told, strict=True))
        self._speculation.pace.note_round(len(guesses), len(tokens))

    def _rows(self) -> Iterator[_Row]:
        yield from self._running
        for rows in self._reading.rows if self._reading else []:
            yield from rows
        for _, rows in self._waiting:
            yield from rows

    def _remove(self, line: int) -> None:
        self._ahead.clear()
        self._cache.remove(line)
        last = self._running.pop()
        if line < len(self._running):
            self._running[line] = last

    def _decode(self) -> Tensor:
        """Return the logits (B, V) after each running row's last token."""
        self._make_room(max(self._cache.lengths) + 1)
        tokens_B1 = torch.tensor([[row.state.new[-1]] for row in self._running], device=self.model.device)
        x_B1D = self._forward.hidden_states(tokens_B1, self._cache)
        if self._speculation is not None and len(self._running) == 1:
            self._speculation.follow(self._running[0].state, self._cache.lengths[0] - 1, x_B1D[0])
        return self._forward.head(x_B1D)[:, -1]

    @property
    def _forward(self) -> FastForward | Transformer:
        if self._prepared is None:
            self._prepared = forward_of(self.model) if self._fast else self.model
        return self._prepared

    def _make_room(self, num_slots: int) -> None:
        """Let the cache hold all requests, and rows of this length."""
        rows, slots = self._cache.room
        if len(self) > rows:
            rows = min(max(len(self), rows * 3 // 2), self.max_rows)
        if num_slots > slots:
            # The last token that a row draws is not computed.
            useful = max(len(row.request.ids) + row.request.max_new_tokens - 1 for row in self._rows())
            slots = max(num_slots, min(slots * 3 // 2, useful, self.model.config.max_seq_len))
        self._cache.reserve(rows, slots)

    def _prefill(self) -> list[Tensor]:
        """Read prompts and return the logits (1, V) of each row that may now run, in their order.

        Stop after `prefill_tokens`, if there is a row that runs.
        """
        logits: list[Tensor] = []
        most = self._prefill_tokens
        read = 0
        while (self._reading or self._waiting) and (most is None or read < most or not self._running):
            reading = self._reading = self._reading or self._next_reading()
            width = max(map(len, reading.prompts)) - reading.done
            width = min(width, _PIECE, most or _PIECE)
            read += width * len(reading.prompts)
            last_BV = self._read(reading, width)
            if last_BV is None:
                continue
            self._make_room(max(reading.cache.lengths))
            self._reading = None
            for line, rows in enumerate(reading.rows):
                for row in rows:
                    self._cache.append(reading.cache, line)
                    self._running.append(row)
                    logits.append(last_BV[line : line + 1])
        return logits

    def _next_reading(self) -> _Reading:
        """Take the next waiting prompts: as many as fit into a piece, or a longer one."""
        most = min(_PIECE, self._prefill_tokens or _PIECE)
        prompts: list[list[int]] = []
        rows: list[list[_Row]] = []
        longest = 0
        while self._waiting:
            longest = max(longest, len(self._waiting[0][0]))
            if prompts and longest * (len(prompts) + 1) > most:
                break
            ids, continued = self._waiting.popleft()
            prompts.append(ids)
            rows.append(continued)
        return _Reading(prompts, rows, self.model.new_cache(len(prompts), max(map(len, prompts))))

    def _read(self, reading: _Reading, width: int) -> Tensor | None:
        """Read the next `width` positions of the prompts; at their end, return the logits (B, V) of the next tokens."""
        pieces = [prompt[reading.done : reading.done + width] for prompt in reading.prompts]
        counts = [len(piece) for piece in pieces]
        tokens_BT = torch.zeros(len(pieces), width, dtype=torch.long)
        for line, piece in enumerate(pieces):
            tokens_BT[line, : len(piece)] = torch.tensor(piece)
        x_BTD = self._forward.hidden_states(tokens_BT.to(self.model.device), reading.cache, counts)
        if self._speculation is not None and len(self) == 1:
            self._speculation.follow(reading.rows[0][0].state, reading.done, x_BTD[0, : counts[0]])
        reading.done += width
        if reading.done < max(map(len, reading.prompts)):
            return None
        last_B = torch.tensor(counts, device=x_BTD.device) - 1
        return self._forward.head(x_BTD[torch.arange(len(pieces), device=x_BTD.device), last_B])

    def _log_probs(self, logits_BV: Tensor, tokens: list[int]) -> dict[int, LogProbs]:
        """Return the log-probabilities of each line whose request asks for them."""
        counts = {line: row.request.logprobs for line, row in enumerate(self._running) if row.request.logprobs}
        if not counts:
            return {}
        lines = list(counts)
        found = log_probs(logits_BV[lines], [tokens[line] for line in lines], max(counts.values()), self._vocab_size)
        return {line: replace(each, top=each.top[: counts[line]]) for line, each in zip(lines, found, strict=True)}

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        if row.state.new[-1] in row.request.stop_ids:
            return "stop"
        if len(row.state.new) == row.request.max_new_tokens:
            return "length"
        read = len(row.request.ids) + len(row.state.new) - 1  # the newest token is not
        return "context" if read == self.model.config.max_seq_len else None


def row_generator(seed: int, sample_number: int) -> torch.Generator:
    """Return a row's own generator. Unlike with seed + row, (seed, row) and (seed + 1, row - 1) differ."""
    mixed = np.random.SeedSequence([seed % 2**64, sample_number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)  # torch takes seeds below 2**63
