"""What guesses the next tokens of `lightlm generate`: its options, their checks, and loading.

Imports no torch before `load`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lightlm.cli.generate.model import ModelChoice

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.generate.speculation import Guesser, Speculation

_COUNT = 4  # guesses per pass, without --guesses

LookupOption = Annotated[
    bool, typer.Option("--lookup", help="Speculative decoding: guess tokens that repeat the text so far.")
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Speculative decoding: guess tokens with a smaller model of the same tokenizer.",
        show_default=False,
    ),
]
MTPOption = Annotated[
    bool,
    typer.Option(
        "--mtp", help="Speculative decoding: guess a token with the head that a run with train.mtp has trained."
    ),
]
GuessesOption = Annotated[
    int | None,
    typer.Option(
        help=f"Guesses per pass, with --lookup or --draft. [dim]Default: {_COUNT}[/]",
        show_default=False,
        min=1,
        metavar="N",
    ),
]


@dataclass(frozen=True)
class Guessing:
    """The values of --lookup, --draft, --mtp and --guesses. `Request` refuses what does not go together."""

    lookup: bool
    draft: str | None
    mtp: bool
    count: int | None

    @property
    def sources(self) -> int:
        """How many sources of guesses are named."""
        return self.lookup + self.mtp + (self.draft is not None)

    def check_files(self) -> None:
        """Raise an error if the draft is not on this machine, unless it is on the Hub."""
        from lightlm.convert.load import is_hub_id, locate

        if self.draft is not None and not is_hub_id(self.draft):
            locate(self.draft)

    def load(self, choice: ModelChoice, loaded: "LoadedModel") -> "Speculation | None":
        """Return the guesses for a model that `choice` has loaded; None if nothing is to guess. Imports torch."""
        if not self.sources:
            return None
        from lightlm.generate.own_draft import own_draft_of
        from lightlm.generate.pace import Pace, round_costs
        from lightlm.generate.speculation import Lookup, Speculation, draft_of

        guesser: Guesser
        if self.mtp:
            guesser = own_draft_of(loaded)
        elif self.draft is not None:
            guesser = draft_of(choice.load_another(self.draft), loaded)
        else:
            guesser = Lookup()
        count = 1 if self.mtp else self.count or _COUNT
        return Speculation(guesser, count, Pace(round_costs(loaded.model, guesser, count)))
