"""The errors that a user can cause, each carrying one message that says what is wrong, where, and what to do.

The command line prints the message without a traceback and exits with `exit_code`.
"""


class LightLMError(Exception):
    """A mistake or a condition outside LightLM that the user can act on."""

    exit_code = 1


class UsageError(LightLMError):
    """The command line itself is wrong: a malformed option value or a contradiction between options."""

    exit_code = 2


class RecipeError(LightLMError):
    """A recipe or an override does not fit the schema; the message lists every mistake at once."""


class DataError(LightLMError):
    """A text source, a tokenizer or a prepared data folder is missing, damaged or does not fit."""


class CheckpointError(LightLMError):
    """A run, a checkpoint or a model folder is missing, incomplete or does not fit."""


class ConvertError(LightLMError):
    """A model cannot be expressed in the requested format, or a folder cannot be read as one."""
