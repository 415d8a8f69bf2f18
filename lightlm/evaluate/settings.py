"""Settings of an evaluation, the same for every model."""

from dataclasses import dataclass

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
    """

    tasks: list[str]
    limit: int | None = None
    num_fewshot: int | None = None
    data: str | None = None
    include_path: str | None = None
    data_dir: str | None = None
    bos: str = "auto"
    dtype: str = "auto"


def split_list(names: str) -> list[str]:
    """Split comma-separated names."""
    return [name.strip() for name in names.split(",") if name.strip()]
