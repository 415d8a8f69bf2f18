"""The YAML of recipes: numbers and booleans as in YAML 1.2, no key twice, and mistakes with file and line.

PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90, `no` is false, `1e-3` is text, and the second of two equal
keys wins silently. Editors, which check recipes against the JSON Schema, read YAML 1.2.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightlm.errors import RecipeError, UsageError

# Keys whose values are text even if they look like something else: a folder may be called 2024 or no.
_SPANS = (
    "schedule.warmup", "schedule.rewarmup", "schedule.batch_warmup", "data.stages.until", "train.ema",
    "train.mtp.anneal",
)  # fmt: skip
_NAMES = ("name", "data.dataset", "data.stages.dataset", "train.device", "train.distill.teacher", "tracking.project")
_TEXTS = (*_NAMES, *_SPANS)
_TEXTS_OR_NULL = ("train.init_from", "eval.data_dir", "schedule.decay")
_LISTS_OF_TEXTS = ("eval.prompts", "eval.tasks")
_FOLDERS = ("data.mix", "data.stages.mix")  # their keys are names of folders
TEXT_KEYS = frozenset((*_TEXTS, *_TEXTS_OR_NULL, *_LISTS_OF_TEXTS))
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_INVISIBLE = {"\t": "a tab", "\xa0": "a non-breaking space", "\u200b": "a zero-width space"}
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_yaml_int(self, node: yaml.Node) -> Any:
        digits = str(self.construct_scalar(node)).replace("_", "")  # type: ignore[arg-type]
        return int(digits) if len(digits) < 4000 else digits  # Python refuses to read longer ones


for _name, _pattern, _first in _RESOLVERS:
    first = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})$"), first)
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


def read_sections(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a YAML file's sections, and the line of each dotted key as `line 12`.

    Raises:
        RecipeError: the file is not YAML in UTF-8 or UTF-16, has a key twice, or does not hold sections.
    """
    text = read_text(path)
    try:
        node = _Loader(text).get_single_node()
        if twice := next(_twice(node), None):
            name, first, again = twice
            raise RecipeError(f"{path}:{again}: {name} is given twice, first in line {first}; keep one")
        _mark_texts(node)
        values = None if node is None else _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}{_explain(error, text)}") from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply to be a recipe") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        what = "is empty" if node is None else "is not a recipe"
        raise RecipeError(f"{path} {what}; write its sections, such as `model:` and `train:`")
    return values, dict(_key_lines(node))


def read_value(key: str, text: str) -> Any:
    """Return the value of an override of the dotted `key`.

    Raises:
        UsageError: the value is not YAML, or has a key twice.
    """
    if key in _TEXTS or (key in _TEXTS_OR_NULL and text not in ("", "~", "null")):
        return text
    try:
        node = _Loader(text).get_single_node()
        if twice := next(_twice(node), None):
            raise UsageError(f"'{key}={text}': {twice[0]} is given twice; keep one")
        _mark_texts(node, key)
        return None if node is None else _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise UsageError(f"the value of '{key}={text}'{_explain(error, text)}") from None
    except RecursionError:
        raise UsageError(f"the value of '{key}=...' is nested too deeply") from None


def read_text(path: Path) -> str:
    """Return the text of a recipe's file.

    Raises:
        RecipeError: it is neither UTF-8 nor UTF-16 with a mark.
    """
    raw = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: byte {error.start + 1} is not {encoding}; save the file as UTF-8") from None
    if "\0" in text:
        raise RecipeError(f"{path} holds NUL characters, as UTF-16 without a mark does; save it as UTF-8")
    return text


def _explain(error: yaml.YAMLError, text: str) -> str:
    """Return `:LINE: problem` of an error in the text."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, int(error.position)) + 1
        return f":{line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML; remove it"
    if not isinstance(error, yaml.MarkedYAMLError) or (mark := error.problem_mark) is None:
        return f": {error}"
    indent = re.match(r"\s*", "".join(text.splitlines()[mark.line : mark.line + 1]))
    for letter, name in _INVISIBLE.items():
        if (indent and letter in indent[0]) or repr(letter)[1:-1] in str(error.problem):
            return f":{mark.line + 1}: {name}, where YAML wants spaces; replace it"
    context = f"{error.context}, " if error.context else ""
    return f":{mark.line + 1}: not valid YAML: {context}{error.problem}"


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int, int]]:
    """Yield each key that a mapping holds twice, with both lines."""
    seen: set[int] = set()  # an alias is its anchor's node, and may lie inside it
    open_nodes = [node]
    while open_nodes:
        current = open_nodes.pop()
        if not isinstance(current, yaml.CollectionNode) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, yaml.SequenceNode):
            open_nodes += current.value
            continue
        lines: dict[str, int] = {}
        for key, value in current.value:
            open_nodes.append(value)
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    yield key.value, lines[key.value], line
                lines[key.value] = line


def _mark_texts(node: yaml.Node | None, path: str = "") -> None:
    """Give the values of `TEXT_KEYS` and the names of folders the tag of text; null stays null."""
    if path in TEXT_KEYS:
        for scalar in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(scalar, yaml.ScalarNode) and scalar.tag != _TAG + "null":
                scalar.tag = _TAG + "str"
    elif isinstance(node, yaml.MappingNode) and path in _FOLDERS:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = _TAG + "str"
    elif isinstance(node, yaml.MappingNode) and path.count(".") < 2:
        for key, value in node.value:
            _mark_texts(value, f"{path}.{key.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode) and path == "data.stages":
        for stage in node.value:
            if isinstance(stage, yaml.MappingNode):
                _mark_texts(stage, path)


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode) and prefix.count(".") < 2:  # an alias may lie inside its anchor
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, f"line {key.start_mark.line + 1}"
            yield from _key_lines(value, f"{path}.")
