"""`python -m lightlm.evaluate run ...`: lm-eval's own command, to which the model `lightlm` and `heldout` are known."""

import sys

from lm_eval.__main__ import cli_evaluate

import lightlm.evaluate.harness  # noqa: F401  (registers the model)
from lightlm.evaluate.heldout import TASKS

# lm-eval's own default is cuda:0, there or not.
_DEFAULTS = {"--include_path": str(TASKS), "--device": "auto"}

if __name__ == "__main__":
    if "run" in sys.argv[1:2]:
        for option, value in _DEFAULTS.items():
            if option not in sys.argv:
                sys.argv += [option, value]
    cli_evaluate()
