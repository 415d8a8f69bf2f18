"""What a checkpoint of another training program holds, and the model that it makes. Imports nothing heavy.

A program is a `Layout`: a table of its settings and of its tensors' names. Settings that no table places are refused.
"""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.huggingface.config import read_json
from lightlm.convert.layouts import Layout, Link
from lightlm.errors import ConvertError, DataError
from lightlm.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from lightlm.checkpoint import LoadedModel
    from lightlm.data.tokenizer import Tokenizer

_HEAD_BYTES = 1 << 20  # a file of torch.save names its first tensors there
_TORCH_SIGNATURES = (b"PK\x03\x04", b"\x80\x02")  # zip archives, and files of torch before 1.6
LARGEST_SETTING = 1 << 24  # above every width, vocabulary and context; products of two fit in 64 bits
_WHOLE, _NUMBERS = ({setting.name for setting in fields(ModelConfig) if setting.type is kind} for kind in (int, float))
GPT2_VOCABULARIES = (50_257, 50_304)  # GPT-2's, and the same padded to a multiple of 64 or 128

GPT2_LINKS = (
    Link("transformer.wte", "embed_tokens"),
    Link("transformer.wpe", "embed_positions"),
    Link("transformer.h.{}.ln_1", "blocks.{}.attention_norm"),
    Link(
        "transformer.h.{}.attn.c_attn",
        "blocks.{}.attention.q_proj blocks.{}.attention.k_proj blocks.{}.attention.v_proj",
    ),
    Link("transformer.h.{}.attn.c_proj", "blocks.{}.attention.o_proj"),
    Link("transformer.h.{}.ln_2", "blocks.{}.mlp_norm"),
    Link("transformer.h.{}.mlp.c_fc", "blocks.{}.mlp.up_proj"),
    Link("transformer.h.{}.mlp.c_proj", "blocks.{}.mlp.down_proj"),
    Link("transformer.ln_f", "norm"),
    Link("lm_head", "lm_head"),
)


@dataclass(frozen=True)
class Contents:
    """A checkpoint: the shape of its model, and tensors under the program's names."""

    layout: Layout
    config: ModelConfig
    tensors: "dict[str, Tensor]"
    file: Path  # that holds the weights

    def load(self, tokenizer: "Tokenizer", path: Path) -> "LoadedModel":
        """Return the model in float32, in evaluation mode, under the path that the user named.

        Raises:
            ConvertError: tensors are missing or left over, or the tokenizer is another model's.
            CheckpointError: tensors do not have the shapes that the settings give.
        """
        from lightlm.checkpoint import LoadedModel, build_model
        from lightlm.convert.renaming import our_state

        # A character-level tokenizer has an end-of-text token that the model does not have.
        if tokenizer.vocab_size > self.config.vocab_size + (tokenizer.end_of_text_id == self.config.vocab_size):
            raise ConvertError(
                f"{path} has a vocabulary of {self.config.vocab_size:,}, and the tokenizer beside it has "
                f"{tokenizer.vocab_size:,} entries: it belongs to another model; replace it with the model's own"
            )
        state = our_state(self.layout, self.config, dict(self.tensors), self.file)
        return LoadedModel(build_model(self.config, state, str(self.file)).eval(), tokenizer, path, (self.file,))


def begins_with(path: Path, *names: bytes) -> bool:
    """Return whether a file is one of torch.save that names these tensors among its first; reads at most 1 MB."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return head.startswith(_TORCH_SIGNATURES) and all(name in head for name in names)


def read_torch_file(path: Path) -> dict[Any, Any]:
    """Return the dictionary in a file of torch.save. Raises ConvertError, without running what it may ask for."""
    from lightlm.convert.pickles import read_pickle

    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ConvertError(f"{path} does not hold a dictionary of tensors")
    return content


def clean_tensors(given: Any, path: Path) -> "dict[str, Tensor]":
    """Return what a file holds as its weights by name, without the prefixes of DDP and torch.compile.

    Raises:
        ConvertError: they are not named tensors of floating-point numbers.
    """
    import torch

    from lightlm.checkpoint import clean_state

    if not isinstance(given, dict) or not given:
        raise ConvertError(f"{path} holds no dictionary of tensors")
    for name, tensor in given.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConvertError(f"{path}: {reprlib.repr(name)} is {type(tensor).__name__}, not a named tensor")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ConvertError(f"{path}: {name} is not a plain tensor; save the weights without quantization")
        if not tensor.is_floating_point():
            raise ConvertError(f"{path}: {name} has elements of {str(tensor.dtype).removeprefix('torch.')}, not floats")
    return clean_state(given)


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many blocks the names of tensors belong to, such as `transformer.h.0.ln_1.weight`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def merge_head(tensors: "dict[str, Tensor]", head: str, table: str) -> bool:
    """Return whether the head is the token table; if so, remove the head."""
    import torch

    if head not in tensors or table not in tensors:
        return head not in tensors
    if tied := torch.equal(tensors[head], tensors[table]):
        del tensors[head]
    return tied


def read_settings(layout: Layout, values: dict[str, Any], where: str, blocks: int, **more: Any) -> ModelConfig:
    """Return the shape that a program's settings describe.

    Args:
        values: the settings by the program's names.
        where: their place, for messages.
        blocks: how many the weights have. A number of layers beyond it would take any amount of memory.
        more: fields of ModelConfig that the caller found out.

    Raises:
        ConvertError: LightLM does not have such a model; the message lists every setting in the way.
    """
    given = {**layout.defaults, **values}
    problems = [f"{theirs} is missing" for theirs in layout.keys.values() if theirs not in given]
    problems += [
        f"{key} is {reprlib.repr(given[key])}, must be {' or '.join(map(repr, allowed))}"
        for key, allowed in layout.constants.items()
        if key in given and not any(given[key] == value and type(given[key]) is type(value) for value in allowed)
    ]
    settings = {ours: given[theirs] for ours, theirs in layout.keys.items() if theirs in given}
    for ours, theirs in layout.keys.items():
        value = settings.get(ours, 0)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if ours in _WHOLE and not (whole and 0 <= value <= LARGEST_SETTING):
            problems.append(f"{theirs} is {reprlib.repr(value)}, not a whole number of at most {LARGEST_SETTING:,}")
        elif ours in _NUMBERS and not (whole or isinstance(value, float)):
            problems.append(f"{theirs} is {reprlib.repr(value)}, not a number")
    if not problems and settings["num_layers"] != blocks:
        layers = layout.keys["num_layers"]
        problems.append(f"{layers} is {settings['num_layers']}, but the weights have {blocks} blocks")
    if problems:
        raise ConvertError(f"{where} describes a model LightLM does not have: {'; '.join(problems)}")
    try:
        return ModelConfig(**settings | layout.fixed | more).resolved()
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConvertError(f"{where} does not describe a model: {error}") from None


def find_tokenizer(path: Path, config: ModelConfig, folders: Iterable[Path], known: dict[int, str]) -> "Tokenizer":
    """Return the tokenizer in the first of the folders that has one, else the one that a vocabulary's size stands for.

    Args:
        path: the checkpoint, for messages.
        known: sizes of vocabularies, and the tokenizer that the program uses by default.

    Raises:
        ConvertError: there is none, or it is damaged.
    """
    from lightlm.data.foreign.tokenizers import tokenizer_in
    from lightlm.data.sources.hub.client import download_tokenizer
    from lightlm.data.tokenizer import load_tokenizer
    from lightlm.data.tokenizer.folder import read_settings as read_tokenizer_settings

    folders = list(folders)
    advice = f"copy the model's tokenizer.json into {folders[0]}"
    try:
        for folder in folders:
            if (tokenizer := tokenizer_in([folder])) is None:
                continue
            if not (folder / "tokenizer.json").is_file():
                return tokenizer
            settings = read_tokenizer_settings(folder)
            bos = tokenizer.id_of(settings.get("bos_token"))
            generation = read_json(folder / "generation_config.json")
            return tokenizer.used_as(bos, bool(tokenizer.prefix_ids), settings, generation)
        if (name := known.get(config.vocab_size)) is not None:
            return load_tokenizer(name, lambda repo, _: download_tokenizer(repo, f"Without a network, {advice}."))
    except DataError as error:
        raise ConvertError(f"{path} has no tokenizer that can be read. {error}") from None
    raise ConvertError(
        f"{path} holds no tokenizer, there is none beside it, and its vocabulary of {config.vocab_size:,} is not that "
        f"of a known one: {advice}"
    )
