"""Settings of an evaluation, the same for every model."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from lightlm.errors import UsageError

BOS = {"auto": None, "yes": True, "no": False}  # values of the harness's `add_bos_token`


@dataclass(frozen=True)
class Settings:
    """Tasks and how to run them.

    Args:
        tasks: tasks, groups, tags, glob patterns or YAML files, as in lm-eval's `--tasks`.
        limit: documents per task; None runs all.
        num_fewshot: examples in the prompt; None uses each task's default.
        data: the data folder of heldout and its cloze; None uses that of the model's run.
        include_path: a folder with further tasks; they replace lm-eval's tasks of the same name.
        data_dir: a folder with data sets, laid out like the Hub; None uses LIGHTLM_EVAL_DATA if it is set.
        bos: whether a beginning-of-text token precedes contexts: a key of `BOS` (see `LightLM`).
        dtype: the requested precision of the models, for the names of result files.
        chosen_weights: `ema` or `raw` of a run with `train.ema`, likewise; None is the models' own.
        apply_chat_template: whether prompts are conversations, written with the models' chat templates.
        system_instruction: what prompts begin with; with a chat template, the system's message.
        fewshot_as_multiturn: whether examples are earlier turns of the conversation; else they stand in the question.
            None is yes, as in lm-eval.

    Raises:
        UsageError: no task is given, `bos` is unknown, or examples are to be turns without a chat template.
    """

    tasks: list[str]
    limit: int | None = None
    num_fewshot: int | None = None
    data: str | None = None
    include_path: str | None = None
    data_dir: str | None = None
    bos: str = "auto"
    dtype: str = "auto"
    chosen_weights: str | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None

    @property
    def chosen(self) -> str:
        """What was asked for beside tasks and prompts and changes scores, in words; empty for the defaults."""
        before = {"auto": "", "yes": "with a beginning-of-text token", "no": "without a beginning-of-text token"}
        data = "" if self.data is None else f"data {self.data_name}"
        tasks = "" if self.include_path is None else f"tasks of {self.include_name}"
        return ", ".join(filter(None, ["" if self.dtype == "auto" else self.dtype, before[self.bos], data, tasks]))

    @property
    def data_name(self) -> str:
        """The name of `data`, with a hash unless the folder is in data/; empty without."""
        from lightlm.data.folder import resolve_dataset

        return "" if self.data is None else _name_in(Path("data"), resolve_dataset(self.data))

    @property
    def include_name(self) -> str:
        """The name of `include_path`, with a hash unless the folder is in the working directory; empty without."""
        return "" if self.include_path is None else _name_in(Path(), Path(self.include_path))

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError("--tasks names no task; for example --tasks heldout,hellaswag")
        if self.bos not in BOS:
            raise UsageError(f"--bos {self.bos}: choose {', '.join(BOS)}")
        if self.fewshot_as_multiturn is not None and not self.apply_chat_template:
            raise UsageError("--fewshot-as-multiturn is about conversations; give --apply-chat-template too")


def _name_in(home: Path, folder: Path) -> str:
    """Return a folder's name; outside `home` with a hash of its path, since other folders may have the name."""
    path = Path(os.path.abspath(folder))
    if path.parent.resolve() == home.resolve():  # also a link that leads elsewhere
        return path.name
    path = path.resolve()
    return f"{path.name}~{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def batch_sequences(batch_size: int | str) -> int | None:
    """Return the sequences of --batch-size, None for `auto`; raise UsageError if it is neither."""
    text = str(batch_size)
    if text.startswith("auto"):
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"--batch-size {batch_size}: give a number of at least 1, or auto")
    return int(text)


def split_list(names: str) -> list[str]:
    """Split comma-separated names."""
    return [name.strip() for name in names.split(",") if name.strip()]
