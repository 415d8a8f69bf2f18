"""`python -m lightlm.evaluate run ...`: lm-eval's own command, to which the model `lightlm` and `heldout` are known.

LIGHTLM_EVAL_DATA names a folder of data sets for it too.
"""

import sys

from lm_eval.__main__ import cli_evaluate

import lightlm.evaluate.harness  # noqa: F401  (registers the model)
from lightlm.evaluate.tasks.data_sets import DataSets, find_data_dir
from lightlm.evaluate.tasks.heldout import TASKS

# lm-eval's own default is cuda:0, there or not.
_DEFAULTS = {"--include_path": str(TASKS), "--device": "auto"}


def with_defaults(arguments: list[str]) -> list[str]:
    """Add our defaults to the arguments of `run`; options given, as `--device cpu` or `--device=cpu`, stay."""
    if arguments[:1] != ["run"]:
        return arguments
    given = {argument.partition("=")[0] for argument in arguments}
    added = [word for option, value in _DEFAULTS.items() if option not in given for word in (option, value)]
    return arguments + added


if __name__ == "__main__":
    sys.argv[1:] = with_defaults(sys.argv[1:])
    with DataSets(find_data_dir(None)).in_use():
        cli_evaluate()
