"""One evaluation shared by the processes of a training run.

All processes build the same requests, each answers a part, and all receive all answers. They exchange them in rounds
of a few seconds. In each exchange they also agree to stop, or learn that a process failed, so no process waits longer
than a round.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash
from lm_eval.api.instance import Instance

from lightlm.checkpoint import LoadedModel
from lightlm.errors import LightLMError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results.truncation import Truncation

if TYPE_CHECKING:
    from lightlm.train.distributed import World

_ROUND_SECONDS = 5.0  # longest reaction to a signal, and longest wait for another process
_FIRST_ROUND = 20_000.0  # characters per process
_GROUP = 32  # most requests with one context that one process answers together
T = TypeVar("T")


class StoppedError(BaseException):
    """A process was asked to stop, so all do. Like KeyboardInterrupt, it is not the failure of a task."""


class PeerFailedError(LightLMError):
    """The evaluation failed in another process."""


@dataclass(frozen=True)
class _Message:
    position: str  # the sender's position in the evaluation
    content: Any = None
    failure: str = ""
    stop: bool = False


class Exchange:
    """Exchange of data, stop requests and failures between the processes.

    Args:
        stop: once set in any process, all stop at the next round.
    """

    def __init__(self, peers: "World", stop: threading.Event) -> None:
        self.rank, self.size = peers.rank, peers.size
        self._peers, self._stop = peers, stop

    def round(self, position: str, content: T) -> list[T]:
        """Return every process's content, in the order of ranks.

        Raises:
            PeerFailedError: another process failed, or is at another position in the evaluation.
            StoppedError: a process was asked to stop.
        """
        messages = self._peers.gather(_Message(position, content, stop=self._stop.is_set()))
        for rank, message in enumerate(messages):
            if message.failure:
                raise PeerFailedError(f"process {rank} of {self.size}: {message.failure}")
        if len({message.position for message in messages}) > 1:
            raise PeerFailedError(
                f"the {self.size} processes have different examples; give all of them the same data sets"
            )
        if any(message.stop for message in messages):
            raise StoppedError
        return [message.content for message in messages]

    @contextlib.contextmanager
    def broadcasting_failure(self) -> Iterator[None]:
        """Broadcast a failure within the block to the other processes, and wait for them at its end."""
        try:
            yield
            with contextlib.suppress(StoppedError):  # too late to stop
                self.round("end", None)
        except (PeerFailedError, StoppedError):
            raise
        except Exception as error:
            self._peers.gather(_Message("failure", failure=str(error) or type(error).__name__))
            raise


class SharedLightLM(LightLM):
    """LightLM's model for lm-eval that answers this process's part of the requests and returns all answers.

    `finished` receives the share of the requests that is answered, from 0 again for each kind of request.
    """

    fast_decoding = False  # a prepared copy of the weights would take memory from training

    def __init__(
        self, loaded: LoadedModel, exchange: Exchange, finished: Callable[[float], None] = lambda share: None
    ) -> None:
        super().__init__(loaded, show_progress=False)
        self._exchange, self._finished = exchange, finished

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._share(requests, super().loglikelihood)

    def loglikelihood_apart(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, int]]:
        return self._share(requests, super().loglikelihood_apart)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._share(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._share(requests, super().generate_until)

    def _share(self, requests: list[Instance], answer: Callable[[list[Instance]], list[T]]) -> list[T]:
        groups = _groups(requests)
        kind = f"{answer.__name__} {xxhash.xxh3_64_hexdigest(repr([request.args for request in requests]).encode())}"
        rank, size = self._exchange.rank, self._exchange.size
        answers: dict[int, T] = {}
        begin, budget = 0, _FIRST_ROUND
        while begin < len(groups):
            end, characters = begin, 0.0
            while end < len(groups) and (end - begin < size or characters < budget):
                characters += _characters(requests, groups[end]) / size
                end += 1
            mine = [index for group in groups[begin:end][rank::size] for index in group]
            started = time.perf_counter()
            before, self._truncation = self._truncation, Truncation()
            given = answer([requests[index] for index in mine]) if mine else []
            content = dict(zip(mine, given, strict=True)), time.perf_counter() - started, self._truncation
            everyones = self._exchange.round(f"{kind} {begin}", content)
            for theirs, _, _ in everyones:
                answers |= theirs
            self._finished(len(answers) / len(requests))
            self._truncation = sum((cut for *_, cut in everyones), start=before)
            begin = end
            # Equal in all processes, because all have all times.
            budget = min(4 * budget, characters * _ROUND_SECONDS / max(1e-3, *(took for _, took, _ in everyones)))
        return [answers[index] for index in range(len(requests))]


def _groups(requests: Sequence[Instance]) -> list[list[int]]:
    """Group the indices of requests that share a context, so that it is read once; longest groups first."""
    by_context: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        by_context.setdefault(request.args[0], []).append(index)
    groups = [indices[n : n + _GROUP] for indices in by_context.values() for n in range(0, len(indices), _GROUP)]
    return sorted(groups, key=lambda group: _characters(requests, group), reverse=True)


def _characters(requests: Sequence[Instance], group: list[int]) -> int:
    """Return the characters that a group reads: its context once, and its endings."""
    endings = (requests[index].args[1] for index in group if len(requests[index].args) > 1)
    return len(requests[group[0]].args[0]) + sum(len(ending) for ending in endings if isinstance(ending, str))
