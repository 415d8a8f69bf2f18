"""The options of sampling, for every command that generates text."""

from typing import Annotated, Any

import typer

from lightlm.errors import UsageError
from lightlm.generate.sampling import Sampling


def _option(help_text: str, default: str, **settings: Any) -> Any:
    return typer.Option(help=f"{help_text} [dim]Default: {default}[/]", show_default=False, **settings)


TemperatureOption = Annotated[float | None, _option("Divides the logits; 0 takes the most likely token.", "0.8")]
TopKOption = Annotated[int | None, _option("Draw from the k most likely tokens.", "all tokens")]
TopPOption = Annotated[float | None, _option("Draw from the fewest tokens with this total probability.", "0.95")]
MinPOption = Annotated[
    float | None, _option("Draw from tokens with at least this share of the highest probability.", "0, all tokens")
]
TypicalPOption = Annotated[
    float | None,
    _option("Draw from the fewest tokens of this total probability whose surprisal is near the entropy.", "1, all"),
]
RepetitionPenaltyOption = Annotated[
    float | None, _option("Divides positive logits of all tokens so far, multiplies negative ones.", "1")
]
FrequencyPenaltyOption = Annotated[
    float | None, _option("Subtracted from a token's logit each time it is in the answer; -2 to 2.", "0")
]
PresencePenaltyOption = Annotated[
    float | None, _option("Subtracted once from the logits of all tokens in the answer; -2 to 2.", "0")
]
NoRepeatNgramOption = Annotated[int | None, _option("Never repeat this many tokens in a row.", "0, off", min=0)]
LogitBiasOption = Annotated[
    list[str] | None,
    _option("Add to the logit of a token id, -100 (never) to 100; repeatable.", "none", metavar="ID=BIAS"),
]
MinNewTokensOption = Annotated[int | None, _option("Minimum number of tokens before the text may end.", "0", min=0)]


def read_sampling(logit_bias: list[str] | None = None, **given: Any) -> Sampling:
    """Return the settings given; those that are None keep their default.

    Raises:
        UsageError: a value is out of its range, or a bias is not ID=BIAS.
    """
    biases = tuple(_bias(text) for text in logit_bias or ())
    return Sampling(logit_bias=biases, **{name: value for name, value in given.items() if value is not None})


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias {text}: write a token id and a number, such as 50256=-100") from None
