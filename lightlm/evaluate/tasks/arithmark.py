"""ArithMark-3, the arithmetic of the Open SLM Leaderboard: four endings of a text, the likeliest per token counts.

The protocol is that of `bencharithmark-3.py` in the data set AxiomicLabs/Arithmark-3.0: context and ending are encoded
apart, without special tokens, and an ending's log-likelihood is divided by its number of tokens. lm-eval's acc_norm
divides by characters instead.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

_FORMS = ("ctx", "endings", "label"), ("expression", "options", "answer_index")
_ENCODED_APART = "loglikelihood_apart"  # the method of LightLM's model that answers the requests


class ArithMark(ConfigurableTask):
    """The task of `arithmark_3.yaml`. Only LightLM's own model can score it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: Any, ctx: Any, **options: Any) -> list[Instance]:
        """Return a request per ending."""
        built = super().construct_requests(doc, ctx, **options)
        return [dataclasses.replace(request, request_type=_ENCODED_APART) for request in built]


def score_endings(doc: Mapping[str, Any], results: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Return the metrics of a document. Args: results: log-likelihood and number of tokens of each ending."""
    nats_E, tokens_E = np.array(results, dtype=np.float64).T
    return {
        "acc": float(np.argmax(nats_E) == doc["label"]),
        "acc_tokens": float(np.argmax(nats_E / tokens_E) == doc["label"]),
    }


def rows(data: Dataset) -> Dataset:
    """Return the documents with `context`, `endings` and `label`.

    Args:
        data: rows of ArithMark-3 (ctx, endings, label), or of its forerunners (expression, options, answer_index).

    Raises:
        ValueError: the rows have neither form.
    """
    if not any(set(form) <= set(data.column_names) for form in _FORMS):
        raise ValueError(
            f"its rows have {', '.join(data.column_names)}; they need {' or '.join(', '.join(form) for form in _FORMS)}"
        )
    return data.map(_row, remove_columns=data.column_names)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    if "ctx" in row:
        return {"context": row["ctx"], "endings": list(row["endings"]), "label": int(row["label"])}
    endings = [f" {_number(option)}" for option in row["options"]]
    return {"context": row["expression"], "endings": endings, "label": int(row["answer_index"])}


def _number(option: Any) -> str:
    """Write a number as in the data set's file: 7, which `datasets` reads as 7.0 beside fractions."""
    return str(int(option)) if isinstance(option, float) and option.is_integer() else str(option)
