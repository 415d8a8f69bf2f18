"""`python -m lightlm.evaluate run ...`: lm-eval's own command with the model `lightlm` and our tasks.

It also reads data sets from the folder LIGHTLM_EVAL_DATA.
"""

import sys

from lm_eval.__main__ import cli_evaluate

import lightlm.evaluate.harness  # noqa: F401  (registers the model)
from lightlm.errors import LightLMError
from lightlm.evaluate.tasks.data_sets import DataSets
from lightlm.evaluate.tasks.references import TASKS, find_data_dir

# lm-eval's default device is cuda:0, even without a GPU.
_DEFAULTS = {"--include_path": str(TASKS), "--device": "auto"}


def with_defaults(arguments: list[str]) -> list[str]:
    """Add our defaults to the arguments of `run`, except for options that are given."""
    if arguments[:1] != ["run"]:
        return arguments
    given = {argument.partition("=")[0] for argument in arguments}
    added = [word for option, value in _DEFAULTS.items() if option not in given for word in (option, value)]
    return arguments + added


if __name__ == "__main__":
    sys.argv[1:] = with_defaults(sys.argv[1:])
    try:
        with DataSets(find_data_dir(None)).in_use():
            cli_evaluate()
    except LightLMError as error:
        sys.exit(f"Error: {error}")
