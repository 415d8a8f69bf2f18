"""A tokenizer as a folder holds it: its definition, and the end-of-text token that the files beside it name.

The definition is tokenizer.json, or is built from vocab.json and merges.txt, the two files of GPT-2's byte-level BPE.
transformers converts what else there is.
"""

import contextlib
from pathlib import Path
from typing import Any

from lightlm.data.tokenizer.conversion import convert_tokenizer
from lightlm.errors import DataError
from lightlm.files import read_object, refuse_lfs_pointer

DEFINITION, VOCABULARY, MERGES, ADDED = "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS, SPECIAL_TOKENS, MANIFEST = "tokenizer_config.json", "special_tokens_map.json", "manifest.json"
CHAT_TEMPLATE, TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
OTHER_TEMPLATES = "other_chat_templates"  # our key for templates that are not the default one
FURTHER_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # by version of transformers
_SIDES = ("padding_side", "truncation_side")

# Where a folder names its end-of-text token, by id or in characters, in the order in which they are asked.
_DECLARATIONS = (
    (MANIFEST, "end_of_text_id"),  # a LightLM data folder
    ("config.json", "end_of_text_id"),  # a LightLM checkpoint
    ("config.json", "eos_token_id"),
    ("generation_config.json", "eos_token_id"),
    (SETTINGS, "eos_token"),
    (SPECIAL_TOKENS, "eos_token"),
)
COMPANIONS = tuple(dict.fromkeys(name for name, _ in _DECLARATIONS if name != MANIFEST))

# The classes of transformers that read vocab.json and merges.txt as GPT-2 does. Others split text otherwise.
_GPT2_CLASSES = (
    None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "CodeGenTokenizer",
    "CodeGenTokenizerFast",
)  # fmt: skip
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LIKELY_SPECIAL = ("<|endoftext|>",)  # GPT-2's vocab.json lists it among its words

# Files of tokenizers that transformers can convert.
_OTHER_FORMATS = ("tokenizer.model", "spiece.model", "vocab.txt")


def tokenizer_folder(path: Path) -> Path | None:
    """Return the folder whose files describe the tokenizer at `path`; None for a definition of another name."""
    if path.is_dir():
        return path
    return path.parent if path.name in (DEFINITION, VOCABULARY, MERGES, *_OTHER_FORMATS) else None


def read_definition(path: Path) -> bytes:
    """Return the tokenizer.json at `path`, a file or a folder, built from vocab.json and merges.txt if it has none.

    Raises DataError where there is neither, or they cannot be read.
    """
    folder = tokenizer_folder(path)
    file = path if folder is None or path.name == DEFINITION else folder / DEFINITION
    if folder is not None and not file.is_file():
        if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
            return _build(folder)
        return _read_other(folder)
    refuse_lfs_pointer(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"The tokenizer {file} cannot be read: {error.strerror}") from error


def declared_end_of_text(path: Path) -> list[int | str]:
    """Return the end-of-text tokens, ids or characters, that the files beside the tokenizer at `path` name, in order.

    Raises DataError where one of these files is damaged.
    """
    folder = tokenizer_folder(path)
    if folder is None:
        return []
    named: list[int | str] = []
    for file, key in _DECLARATIONS:
        values: dict[str, Any] = {}
        with contextlib.suppress(DataError) if file == MANIFEST else contextlib.nullcontext():  # another program's
            values = _read_json(folder / file)
        value = values.get(key)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool):
                named.append(token)
            elif (content := token_content(token)) is not None:
                named.append(content)
    return named


def token_content(token: Any) -> str | None:
    """Return the characters of a special token, which may be written as an object with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's files say about special tokens and the chat template, for those that are named.

    The keys are those of transformers' tokenizer_config.json: `bos_token` and other roles, with the characters of the
    token or None, further special tokens, sides, and `chat_template`. Of several templates that is the one named
    default; the others are `OTHER_TEMPLATES`, by name. Raises DataError where a file is damaged.
    """
    settings = _read_json(folder / SETTINGS)
    named = _read_json(folder / SPECIAL_TOKENS) | settings
    kept: dict[str, Any] = {role: token_content(named[role]) for role in _SPECIAL_ROLES if role in named}
    for key in FURTHER_TOKENS:
        if isinstance(tokens := named.get(key), list):
            kept[key] = [content for token in tokens if (content := token_content(token)) is not None]
    kept |= {side: settings[side] for side in _SIDES if settings.get(side) in ("left", "right")}
    templates = _read_templates(folder, settings)
    if (default := templates.pop("default", None)) is not None:
        kept["chat_template"] = default
    return kept | ({OTHER_TEMPLATES: templates} if templates else {})


def _read_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates of a folder by name; files win over those in the settings, as in transformers."""
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
    if not isinstance(given, dict):
        given = {"default": given}
    named = settings.get(OTHER_TEMPLATES)  # a checkpoint of LightLM
    given |= named if isinstance(named, dict) else {}
    paths = {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    for name, path in ({"default": folder / CHAT_TEMPLATE} | paths).items():
        if path.is_file():
            try:
                given[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
    return {name: text for name, text in given.items() if isinstance(name, str) and isinstance(text, str)}


def _build(folder: Path) -> bytes:
    """Return the tokenizer.json of a byte-level BPE in GPT-2's two files and those that name its special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    settings = _read_json(folder / SETTINGS)
    vocabulary, merges = _read_json(folder / VOCABULARY), _read_merges(folder / MERGES)
    if settings.get("tokenizer_class") not in _GPT2_CLASSES or any(right.endswith("</w>") for _, right in merges):
        return convert_tokenizer(folder, VOCABULARY)  # another way to split text
    try:
        definition = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    except Exception as error:  # `tokenizers` raises bare Exception, and TypeError for an id that is not a number
        raise DataError(f"{folder / VOCABULARY} and {folder / MERGES} do not fit together: {error}") from error
    definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    definition.decoder = decoders.ByteLevel()
    definition.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_tokens(definition, folder, settings, vocabulary)
    bos = token_content(settings.get("bos_token"))
    if settings.get("add_bos_token") and bos is not None:
        definition.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, definition.token_to_id(bos))]
        )
    return definition.to_str(pretty=True).encode()


def _add_tokens(definition: Any, folder: Path, settings: dict[str, Any], vocabulary: dict[str, int]) -> None:
    """Give the definition the tokens that the folder's files name, at their ids."""
    from tokenizers import AddedToken

    special_tokens = _read_json(folder / SPECIAL_TOKENS)
    special: dict[str, Any] = {name: name for name in _LIKELY_SPECIAL if name in vocabulary}
    for values in (special_tokens, settings):
        roles = [values.get(role) for role in _SPECIAL_ROLES] + list(values.get("additional_special_tokens") or [])
        special |= {content: token for token in roles if (content := token_content(token)) is not None}
    described = {
        token["content"]: (token, int(index))
        for index, token in (settings.get("added_tokens_decoder") or {}).items()
        if token_content(token) is not None
    }
    places = dict(_read_json(folder / ADDED)) | {content: index for content, (_, index) in described.items()}
    places |= {content: vocabulary[content] for content in (*special, *places) if content in vocabulary}
    new = [content for content in special if content not in places]
    for content in [*sorted(places, key=lambda content: int(places[content])), *new]:
        flags = next(
            (token for token in (described.get(content, (None,))[0], special.get(content)) if isinstance(token, dict)),
            {},
        )
        is_special = content in special or bool(flags.get("special"))
        kept = {key: bool(flags[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in flags}
        token = AddedToken(content, special=is_special, **{"normalized": False, **kept})
        (definition.add_special_tokens if is_special else definition.add_tokens)([token])
        if content in places and definition.token_to_id(content) != places[content]:
            raise DataError(
                f"{folder}: the added token {content!r} should have the id {places[content]}, but the next free one is "
                f"{definition.token_to_id(content)}; {VOCABULARY} or {ADDED} lacks entries"
            )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the pairs of a merges.txt. Raises DataError with the line that is not a pair."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise DataError(f"{path}:{number}: {line!r} is not a pair of tokens with a space between them")
        merges.append((left, right))
    return merges


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, DataError, optional=True)


def _read_other(folder: Path) -> bytes:
    """Return the tokenizer.json that transformers makes of another format; raise DataError where there is none."""
    if found := next((name for name in _OTHER_FORMATS if (folder / name).is_file()), None):
        refuse_lfs_pointer(folder / found)
        return convert_tokenizer(folder, found)
    halves = {name for name in (VOCABULARY, MERGES) if (folder / name).is_file()}
    if halves:
        [absent] = {VOCABULARY, MERGES} - halves
        raise DataError(f"{folder} has no {DEFINITION}, and {absent} is missing beside {halves.pop()}")
    raise DataError(
        f"{folder} has no {DEFINITION}, nor {VOCABULARY} and {MERGES}; put the model's there (transformers writes "
        f"it with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
    )
