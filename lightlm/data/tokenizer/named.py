"""The tokenizer that `--tokenizer` names: one to train, one on this machine, or one on the Hub."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightlm.data.bpe_training import train_bpe
from lightlm.data.tokenizer.end_of_text import END_OF_TEXT_NAMES
from lightlm.data.tokenizer.folder import read_settings, tokenizer_folder
from lightlm.data.tokenizer.tokenizer import Tokenizer
from lightlm.errors import CheckpointError, DataError, UsageError
from lightlm.names import note_clash
from lightlm.runs import checkpoints, find_run

NAMED_TOKENIZERS = {"gpt2": "openai-community/gpt2"}
# 257 entries are the bytes and the end-of-text token; below 300 a tokenizer has hardly any merges.
MIN_VOCAB_SIZE = 300

_OFFLINE_HINT = (
    "Offline, use --tokenizer train:8192, which trains one on the data, or --tokenizer PATH with a tokenizer.json."
)


def requested_vocab_size(spec: str) -> int | None:
    """Return the N of `train:N`, or None for a spec that names an existing tokenizer.

    Raises UsageError where N is not a whole number, or leaves no room for merges.
    """
    kind, _, number = spec.partition(":")
    if kind != "train":
        return None
    if not (number.isascii() and number.isdigit()) or int(number) < MIN_VOCAB_SIZE:
        raise UsageError(
            f"--tokenizer {spec}: write the number of entries to train, at least {MIN_VOCAB_SIZE} (256 bytes, the "
            "end-of-text token, and some merges), for example train:8192"
        )
    return int(number)


def tokenizer_path(spec: str) -> Path | None:
    """Return the path of the tokenizer on this machine that `spec` names; None if it is on the Hub, or nowhere.

    For a run, by path or by name, it is that of its newest checkpoint. Raises DataError if the run has none.
    """
    path = Path(spec)
    if spec in NAMED_TOKENIZERS:
        return None
    try:
        run = find_run(spec)
    except CheckpointError:
        return path if path.exists() else None
    if run != path:
        note_clash(spec, f"the run {run}", [path] if path.name != "latest" else [])
    if not (saved := checkpoints(run)):
        raise DataError(f"The run {run} has no checkpoint yet, which would hold its tokenizer; name its data folder.")
    return saved[-1]


def load_tokenizer(spec: str, download: Callable[[str, str], Path], end_of_text: str | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names: `gpt2`, a Hub id, a run, or a path that `Tokenizer.read` reads.

    `download(repository, hint)` returns the local folder with the tokenizer of a Hub repository; `hint` is for its
    errors (see `sources.hub.client.download_tokenizer`). `gpt2` is the Hub's even if a folder is called so (see
    `lightlm.names`); otherwise an existing path takes precedence over a Hub id. Raises DataError where there is no such
    tokenizer, or it has no token `end_of_text`.
    """
    path = Path(spec)
    if spec in NAMED_TOKENIZERS:
        note_clash(spec, f"{NAMED_TOKENIZERS[spec]} on the Hugging Face Hub", [path])
    elif (found := tokenizer_path(spec)) is not None:
        return Tokenizer.read(found, end_of_text=end_of_text)
    if path.suffix == ".json" or path.is_absolute() or spec.startswith(".") or spec.count("/") > 1:
        raise DataError(f"There is no tokenizer {spec}. Give the path of a tokenizer.json, gpt2, a run, or a Hub id.")
    repo = NAMED_TOKENIZERS.get(spec, spec)
    return Tokenizer.read(download(repo, _OFFLINE_HINT), origin=repo, end_of_text=end_of_text)


def tokenizer_settings(spec: str, download: Callable[[str, str], Path]) -> dict[str, Any]:
    """Return what the files of the tokenizer that `spec` names say about special tokens and the chat template.

    See `load_tokenizer` for the arguments, and `folder.read_settings`.
    """
    path = None if spec in NAMED_TOKENIZERS else tokenizer_path(spec)
    path = path or download(NAMED_TOKENIZERS.get(spec, spec), _OFFLINE_HINT)
    folder = tokenizer_folder(path)
    return {} if folder is None else read_settings(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_of_text: str | None = None) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer; the same texts give the same bytes.

    `end_of_text` is its end-of-text token, `<|endoftext|>` by default.

    All 256 bytes are in the alphabet, so decode restores every encoded text. Training stops before `vocab_size` if no
    pair of tokens occurs twice: `.vocab_size` of the result is the size reached. Words of more than 1,000 characters
    are cut (see `lightlm.data.long_runs`). Raises UsageError for fewer than `MIN_VOCAB_SIZE` entries.
    """
    requested_vocab_size(f"train:{vocab_size}")
    end_of_text = end_of_text or END_OF_TEXT_NAMES[0]
    definition = train_bpe(texts, vocab_size, end_of_text)
    return Tokenizer(definition, origin="the trained tokenizer", end_of_text=end_of_text)
