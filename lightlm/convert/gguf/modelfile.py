"""The Modelfile that Ollama reads beside a GGUF file: `ollama create NAME -f NAME.Modelfile`."""

import re
import shlex
from pathlib import Path

import xxhash

from lightlm.checkpoint import LoadedModel

# Turns as Qwen and SmolLM2 write them.
_CHAT_ML = '''TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""'''


_CHECKSUM = "# Written by LightLM. An export replaces this file as long as nothing above has changed: "


def modelfile_path(out: Path) -> Path:
    """Return where the Modelfile of a GGUF file is: `demo.gguf` has `demo.Modelfile`."""
    return out.with_suffix(".Modelfile")


def is_unchanged(path: Path) -> bool:
    """Return whether a file is a Modelfile as `modelfile` made it."""
    try:
        body, _, checksum = path.read_bytes().decode().rpartition(_CHECKSUM)
    except (OSError, UnicodeDecodeError):
        return False
    return checksum.strip() == _checksum(body)


def _checksum(body: str) -> str:
    return xxhash.xxh3_64_hexdigest(body.encode())


def modelfile(loaded: LoadedModel, out: Path) -> str:
    """Return the Modelfile of a GGUF file in the same folder.

    Without a chat template the prompt is continued as it is. Ollama's own context is 4,096 positions, which may be more
    than the model has.
    """
    tokenizer = loaded.tokenizer
    ends = [str(tokenizer.name_of(index)) for index in sorted(tokenizer.end_ids)]
    template = tokenizer.settings.get("chat_template", "")
    # Ollama's templates are in another language. It knows that of a usual chat template by itself.
    form = _CHAT_ML if all(mark in template for mark in ("<|im_start|>", "<|im_end|>")) else ""
    name = re.sub(r"[^\w.-]+", "-", loaded.name, flags=re.ASCII).strip("-") or "model"
    lines = [
        f"# ollama create {name} -f {shlex.quote(out.with_suffix('.Modelfile').name)}",
        f"FROM ./{out.name}",
        *([form] if form else [] if template else ['TEMPLATE "{{ .Prompt }}"']),
        f"PARAMETER num_ctx {loaded.model.config.max_seq_len}",
        *(f"PARAMETER stop {quoted(end)}" for end in ends if end.isprintable()),
        *(f"# Ollama drops the characters of the end token {end!a}" for end in ends if not end.isprintable()),
    ]
    body = "\n".join(lines) + "\n"
    return f"{body}{_CHECKSUM}{_checksum(body)}\n"


def quoted(value: str) -> str:
    """Return a line's value as Ollama's parser reads it: it knows no escapes, and cuts quotes only at the ends."""
    plain = f'"{value}"'
    return f'""{plain}""' if plain.startswith('"""') else plain
