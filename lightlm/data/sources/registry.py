"""The sources of `lightlm prepare-data SOURCE`. A source is a module here and a row of `NAMES` or `PREFIXES`."""

import difflib
import glob
import os
import re
from pathlib import Path

from lightlm.data.select.filters import Filter
from lightlm.data.sources.base import Opener, Source
from lightlm.data.sources.hub.names import HUB_DATASETS, PREFIX
from lightlm.data.sources.hub.source import open_hub
from lightlm.data.sources.local import LocalSource
from lightlm.data.sources.pydocs import PYDOCS, open_pydocs
from lightlm.data.sources.skills import SKILLS_SOURCE, open_skills
from lightlm.errors import DataError
from lightlm.names import note_clash

NAMES: dict[str, Opener] = {PYDOCS: open_pydocs, SKILLS_SOURCE: open_skills, **dict.fromkeys(HUB_DATASETS, open_hub)}
PREFIXES: dict[str, Opener] = {PREFIX: open_hub}


def open_source(spec: str, text_column: str = "text", row_filter: Filter | None = None) -> Source:
    """Return the source that `spec` names: a row of `NAMES` or `PREFIXES`, or else a file, folder or glob.

    A name of `NAMES` wins over a file or folder here, with a note (see `lightlm.names`). It may be followed by
    `:configuration` and `@revision`. The rest is as `Opener` says.
    """
    name = re.split("[:@]", spec, maxsplit=1)[0]
    opener = next((PREFIXES[prefix] for prefix in PREFIXES if spec.startswith(prefix)), NAMES.get(name))
    if name in NAMES:
        note_clash(name, "the data set that LightLM knows by it", [Path(name)])
    if opener is not None:
        return opener(spec, text_column, row_filter)
    path = Path(spec).expanduser()
    if os.path.lexists(path) or glob.has_magic(spec):
        return LocalSource(path, text_column, row_filter)
    if path.suffix or path.is_absolute() or spec.startswith(".") or spec.count("/") > 1:
        raise DataError(f"There is no file or folder {spec}.")
    if "/" in spec:
        raise DataError(f"There is no file or folder {spec}. Write a data set on the Hugging Face Hub as hf:{spec}")
    near = difflib.get_close_matches(spec, NAMES, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise DataError(
        f"There is no source {spec!r}, and no file or folder of that name.{guess} "
        f"Known names: {', '.join(NAMES)}; or give a path, or hf:organization/name."
    )
