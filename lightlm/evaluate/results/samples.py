"""lm-eval's samples on request: prompts, answers and figures of every document, as its `--log_samples` writes them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, sanitize_list

from lightlm import files


def write(results: Path, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write `<name>.samples_<task>.jsonl` beside a results file, a line for each document."""
    for task, entries in samples.items():
        lines = (
            json.dumps(_line(entry), default=handle_non_serializable, ensure_ascii=False) + "\n" for entry in entries
        )
        files.write_text(results.with_suffix(f".samples_{task}.jsonl"), "".join(lines))


def _line(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name and answers as text, as in lm-eval's files: the library `datasets` reads them so."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(one)} for i, one in enumerate(entry["arguments"])
    }
    texts = {key: sanitize_list(entry[key]) for key in ("resps", "filtered_resps")}
    return {**entry, **texts, "arguments": arguments, "target": str(entry["target"])}
