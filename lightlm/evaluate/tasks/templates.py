"""lm-eval's templates, compiled once."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

from lm_eval import utils


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Within the block lm-eval compiles each of a task's templates once: it does so for every field of every document,
    which is most of what a task costs beside the model."""
    environment = getattr(utils, "env", None)
    if environment is None:  # another version of lm-eval
        yield
        return
    with mock.patch.object(environment, "from_string", functools.lru_cache(maxsize=256)(environment.from_string)):
        yield
