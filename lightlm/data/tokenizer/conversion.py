"""Make a tokenizer.json of other files of tokenizers, by transformers' own converters."""

import importlib.util
from pathlib import Path

from lightlm.errors import DataError, how_to_install

SENTENCEPIECE, TIKTOKEN = ("sentencepiece", "google.protobuf"), ("tiktoken",)
_PIP = {"google.protobuf": "protobuf"}  # where the name to install is another one


def convert_tokenizer(folder: Path, file: str) -> bytes:
    """Return the tokenizer.json that transformers makes of a folder; no code of the folder runs.

    Args:
        file: the one in the folder that says what the tokens are.

    Raises:
        DataError: transformers or a package that it needs for this file is not installed, or it cannot read the folder.
    """
    needed = ("transformers", *(_packages(folder / file) if file.endswith(".model") else ()))
    if missing := [name for name in needed if not _is_installed(name)]:
        command = how_to_install("hf") if "transformers" in missing else "run: pip install"
        others = "".join(f" {_PIP.get(name, name)}" for name in missing if name != "transformers")
        raise DataError(
            f"{folder} has no tokenizer.json. transformers makes one of {file}, which needs a package that is not "
            f"installed; {command}{others}"
        )
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        content: str = tokenizer.backend_tokenizer.to_str(pretty=True)
    except Exception as error:  # transformers raises errors of any kind for files it cannot read
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{folder} has no tokenizer.json, and transformers {transformers.__version__} cannot make one of {file}: "
            f"{reason}. Put the model's own tokenizer.json there"
        ) from None
    return content.encode()


def _packages(path: Path) -> tuple[str, ...]:
    """Return the packages that read a *.model: tiktoken's are lines of base64 and a number, SentencePiece's binary."""
    try:
        with path.open("rb") as file:
            return TIKTOKEN if file.read(200).isascii() else SENTENCEPIECE
    except OSError as error:
        raise DataError(f"The tokenizer {path} cannot be read: {error.strerror}") from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False
