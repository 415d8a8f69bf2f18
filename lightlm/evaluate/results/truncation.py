"""Requests whose beginning was cut, because they are longer than the model's context."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Truncation:
    """How much of a task's requests the model did not see.

    Args:
        requests: all requests of the task; a question with four answers has four.
        cut: the requests that lost tokens at their beginning.
        tokens: the tokens that were cut, in total.
        most: the tokens cut from the request that lost most.
    """

    requests: int = 0
    cut: int = 0
    tokens: int = 0
    most: int = 0

    @classmethod
    def of(cls, excesses: Iterable[int]) -> "Truncation":
        """Count requests from the tokens that each has too many; 0 or less means that it fits."""
        counts = list(excesses)
        cut = [count for count in counts if count > 0]
        return cls(len(counts), len(cut), sum(cut), max(cut, default=0))

    def __add__(self, other: "Truncation") -> "Truncation":
        return Truncation(
            self.requests + other.requests,
            self.cut + other.cut,
            self.tokens + other.tokens,
            max(self.most, other.most),
        )

    def sentence(self, task: str, num_fewshot: int | None = None) -> str:
        """Return the counts in words, and what to do about them."""
        amount = f"{self.tokens / self.cut:,.0f} tokens on average, {self.most:,} at most"
        first = f"; the first of the {num_fewshot} examples go first, so ask for fewer" if num_fewshot else ""
        return (
            f"{task}: the beginning of {self.cut:,} of {self.requests:,} requests was cut to fit the model's context "
            f"({amount}){first}"
        )

    def to_dict(self) -> dict[str, int]:
        """Return the counts for `--json` and the facts of a result."""
        return asdict(self)


UNCUT = Truncation()


def read_truncations(facts: Mapping[str, Any]) -> dict[str, Truncation]:
    """Return the truncations by task from the facts of a result; empty for results of older versions."""
    found = facts.get("truncated")
    return {task: Truncation(**counts) for task, counts in found.items()} if isinstance(found, dict) else {}
