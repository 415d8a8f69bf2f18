"""One evaluation shared by the processes of a run, in which no process is left waiting for another.

All of them build the same requests, each answers a part, and all learn all answers. They meet every few seconds, in
rounds: there they also agree to stop, or learn that one of them has failed. So nobody waits longer than a round takes,
however long the evaluation is.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import xxhash
from lm_eval.api.instance import Instance

from lightlm.checkpoint import LoadedModel
from lightlm.errors import LightLMError
from lightlm.evaluate.harness import LightLM

_ROUND_SECONDS = 5.0  # as long as a signal may go unnoticed, and one process wait for another
_FIRST_ROUND = 20_000.0  # characters for each process
_GROUP = 32  # requests with one context that stay together
Answer = TypeVar("Answer")
T = TypeVar("T")


class Peers(Protocol):
    """The processes that share the work, seen from one of them: `lightlm.train.distributed.World`."""

    rank: int
    size: int

    def gather(self, value: T) -> list[T]: ...


class StoppedError(Exception):
    """One of the processes was asked to stop, and all have agreed to."""


class PeerFailedError(LightLMError):
    """The evaluation failed in another process."""


@dataclass(frozen=True)
class _Message:
    place: str  # where in the evaluation its sender is
    content: Any = None
    failure: str = ""
    stop: bool = False


class Meetings:
    """Where the processes exchange what they have.

    Args:
        stop: when set in one process, all leave at the next meeting.
    """

    def __init__(self, peers: Peers, stop: threading.Event) -> None:
        self.rank, self.size = peers.rank, peers.size
        self._peers, self._stop = peers, stop

    def exchange(self, place: str, content: T) -> list[T]:
        """Every process's content, in the order of ranks.

        Raises:
            PeerFailedError: another process has failed, or is at another place of the evaluation.
            StoppedError: one was asked to stop.
        """
        messages = self._peers.gather(_Message(place, content, stop=self._stop.is_set()))
        for rank, message in enumerate(messages):
            if message.failure:
                raise PeerFailedError(f"process {rank} of {self.size}: {message.failure}")
        if len({message.place for message in messages}) > 1:
            raise PeerFailedError(
                f"the {self.size} processes were given different examples; their data sets must be the same"
            )
        if any(message.stop for message in messages):
            raise StoppedError
        return [message.content for message in messages]

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Around an evaluation: if it fails here, the others are told, and all that happens until its end counts."""
        try:
            yield
            with contextlib.suppress(StoppedError):  # too late: all is done
                self.exchange("end", None)
        except (PeerFailedError, StoppedError):
            raise
        except Exception as error:
            self._peers.gather(_Message("failure", failure=str(error) or type(error).__name__))
            raise


class SharedLightLM(LightLM):
    """LightLM's model for lm-eval, which answers its process's part of the requests and returns everybody's answers."""

    def __init__(self, loaded: LoadedModel, meetings: Meetings) -> None:
        super().__init__(loaded, show_progress=False)
        self._meetings = meetings

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._share(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._share(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._share(requests, super().generate_until)

    def _share(self, requests: list[Instance], answer: Callable[[list[Instance]], list[Answer]]) -> list[Answer]:
        groups = _groups(requests)
        kind = f"{answer.__name__} {xxhash.xxh3_64_hexdigest(repr([request.args for request in requests]).encode())}"
        rank, size = self._meetings.rank, self._meetings.size
        answers: dict[int, Answer] = {}
        begin, budget = 0, _FIRST_ROUND
        while begin < len(groups):
            end, characters = begin, 0.0
            while end < len(groups) and (end - begin < size or characters < budget):
                characters += _characters(requests, groups[end]) / size
                end += 1
            mine = [index for group in groups[begin:end][rank::size] for index in group]
            started = time.perf_counter()
            given = answer([requests[index] for index in mine]) if mine else []
            content = (mine, given, time.perf_counter() - started)
            seconds = 1e-3
            for indices, theirs, took in self._meetings.exchange(f"{kind} {begin}", content):
                answers.update(zip(indices, theirs, strict=True))
                seconds = max(seconds, took)
            begin = end
            # The same in all processes, since all know all times.
            budget = min(4 * budget, characters * _ROUND_SECONDS / seconds)
        return [answers[index] for index in range(len(requests))]


def _groups(requests: Sequence[Instance]) -> list[list[int]]:
    """Indices of requests that share a context, so that it is read once; the longest first, alike ones side by side."""
    by_context: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        by_context.setdefault(request.args[0], []).append(index)
    groups = [indices[n : n + _GROUP] for indices in by_context.values() for n in range(0, len(indices), _GROUP)]
    return sorted(groups, key=lambda group: _characters(requests, group), reverse=True)


def _characters(requests: Sequence[Instance], group: list[int]) -> int:
    """What is read for a group: its context once, and its endings; of a whole document, or a prompt, itself."""
    endings = (requests[index].args[1] for index in group if len(requests[index].args) > 1)
    return len(requests[group[0]].args[0]) + sum(len(ending) for ending in endings if isinstance(ending, str))
