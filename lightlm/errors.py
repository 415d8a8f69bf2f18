"""The errors that a user can cause. A message says what is wrong, where, and what to do.

The command line prints it without a traceback and exits with `exit_code`.
"""


def how_to_install(extra: str) -> str:
    """Return what a message about a missing package advises. LightLM is on no package index: extras need the clone."""
    return f'run in the clone of LightLM: pip install --constraint constraints.txt --editable ".[{extra}]"'


class LightLMError(Exception):
    """A mistake, or a condition outside LightLM, on which the user can act."""

    exit_code = 1


class UsageError(LightLMError):
    """The command line is wrong: a malformed option value, or options that contradict each other."""

    exit_code = 2


class RecipeError(LightLMError):
    """A recipe or an override does not fit the schema; the message lists all mistakes."""


class DataError(LightLMError):
    """A text source, a tokenizer or a prepared data folder is missing, damaged or unsuitable."""


class CheckpointError(LightLMError):
    """A run, a checkpoint or a model folder is missing, incomplete or unsuitable."""


class ConvertError(LightLMError):
    """A model cannot be expressed in the requested format, or a folder cannot be read as one."""


class DiskFullError(LightLMError, OSError):
    """There is no room for a file: the disk is full, or a quota or limit is reached."""


class TrainingDivergedError(LightLMError):
    """The loss or the gradient became NaN or infinite; the same run would diverge again."""

    exit_code = 3


# On MPS and on a CPU (the third text is that of Windows) the error is a plain RuntimeError, and so is that of cuBLAS,
# which takes memory beside torch's.
_TOLD = ("out of memory", "can't allocate memory", "not enough memory: you tried", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device's memory did not suffice. torch's own error is known by name: torch is not imported."""
    told = type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _TOLD)
    return isinstance(error, RuntimeError) and told
