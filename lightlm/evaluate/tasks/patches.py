"""Changes to lm-eval's behavior that it offers no setting for, each a context manager."""

import contextlib
import functools
import logging
import os
import subprocess
from collections.abc import Iterator
from unittest import mock

from lm_eval import utils

from lightlm.data.sources.hub.client import quiet_libraries


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval and the Hub's libraries below errors, and keep what they print off standard output."""
    # lm-eval asks git for a commit; outside a repository git's complaint would reach the terminal.
    silent_git = functools.partial(subprocess.check_output, stderr=subprocess.DEVNULL)
    with (
        quiet_libraries("lm_eval", "filelock", "urllib3", "evaluate", level=logging.ERROR),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        mock.patch.object(subprocess, "check_output", silent_git),
    ):
        yield


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Compile each template once. lm-eval compiles one per field and document, its main cost beside the model."""
    cached = functools.lru_cache(maxsize=256)(utils.env.from_string)
    with mock.patch.object(utils.env, "from_string", cached):
        yield
