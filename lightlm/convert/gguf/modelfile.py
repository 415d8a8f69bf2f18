"""The Modelfile that Ollama reads beside a GGUF file: `ollama create NAME -f NAME.Modelfile`."""

import re
import shlex
from pathlib import Path

import xxhash

from lightlm.checkpoint import LoadedModel
from lightlm.data.chat.template import ChatTemplate
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import LightLMError

# Turns as Qwen and SmolLM2 write them, after a system message.
_CHAT_ML = '''TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""'''


_QUESTION = "What is it?"

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
    chats = "chat_template" in tokenizer.settings
    name = re.sub(r"[^\w.-]+", "-", loaded.name, flags=re.ASCII).strip("-") or "model"
    lines = [
        f"# ollama create {name} -f {shlex.quote(out.with_suffix('.Modelfile').name)}",
        f"FROM ./{out.name}",
        *(_turns(tokenizer) if chats else ['TEMPLATE "{{ .Prompt }}"']),
        f"PARAMETER num_ctx {loaded.model.config.max_seq_len}",
        *(f"PARAMETER stop {quoted(end)}" for end in ends if end.isprintable()),
        *(f"# Ollama drops the characters of the end token {end!a}" for end in ends if not end.isprintable()),
    ]
    body = "\n".join(lines) + "\n"
    return f"{body}{_CHECKSUM}{_checksum(body)}\n"


def _turns(tokenizer: Tokenizer) -> list[str]:
    """Return how Ollama writes a conversation: ChatML, with the system message that a template begins with by itself.

    Ollama's templates are in another language, and it knows those of some usual chat templates by itself. So a template
    that writes anything else has no lines.
    """
    try:
        text = ChatTemplate.of(tokenizer).render([{"role": "user", "content": _QUESTION}])
    except LightLMError:  # it needs more than a question
        return []
    before, turn, after = text.partition(f"<|im_start|>user\n{_QUESTION}<|im_end|>\n")
    system = re.fullmatch(r"(?:<\|im_start\|>system\n(.*)<\|im_end\|>\n)?", before, flags=re.DOTALL)
    if not turn or after != "<|im_start|>assistant\n" or system is None:
        return []
    said = system[1]
    return [_CHAT_ML, *([f'SYSTEM """{said}"""' if "\n" in said else f"SYSTEM {quoted(said)}"] if said else [])]


def quoted(value: str) -> str:
    """Return a line's value as Ollama's parser reads it: it knows no escapes, and cuts quotes only at the ends."""
    plain = f'"{value}"'
    return f'""{plain}""' if plain.startswith('"""') else plain
