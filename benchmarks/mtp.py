"""What a guess of a model's own head of multi-token prediction costs, by recipe, with random weights.

    python benchmarks/mtp.py [RECIPE=VOCABULARY ...]

Prints what a round of one guess takes in plain steps. Guesses pay where more of them are right than this minus 1.
benchmarks/speculation.py measures a trained run, whose guesses are right or wrong.
"""

from dataclasses import replace

import torch
from common import make_parser

from lightlm.generate.own_draft import OwnDraft
from lightlm.generate.pace import round_costs
from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe

_RECIPES = ["demo=8192", "lightlm-30m=16384", "lightlm=50257", "moe=50257", "deepseek-demo=8192", "deepseek-mini=50257"]


def main() -> None:
    """Measure each recipe's shape in bf16."""
    parser = make_parser(__doc__)
    parser.add_argument("recipes", nargs="*", default=_RECIPES, metavar="RECIPE=VOCABULARY")
    for recipe in parser.parse_args().recipes:
        name, _, vocab_size = recipe.partition("=")
        torch.manual_seed(0)
        model = Transformer(replace(load_recipe(name).model, vocab_size=int(vocab_size)), 1).eval().bfloat16()
        [cost] = round_costs(model, OwnDraft(model, model, int(vocab_size)), 1)
        parameters = model.num_parameters()["total"]
        print(f"{name}, {parameters:,} parameters: {cost:.2f} plain steps per round", flush=True)


if __name__ == "__main__":
    main()
