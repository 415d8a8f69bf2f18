"""The data of a run: one prepared folder, or several with one tokenizer, which a recipe mixes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from lightlm.data.folder import DataFolder, resolve_dataset
from lightlm.data.shards import Split, TokenStream
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import DataError
from lightlm.recipe.sections.data import DataSection


class TrainingData:
    """Open data folders by their labels, in the order of the recipe; they have one tokenizer."""

    def __init__(self, folders: Mapping[str, DataFolder], main: DataFolder) -> None:
        """Take at least one folder, and the one that stands for all where only one can be read.

        Raises DataError for two that cannot be mixed.
        """
        self.folders, self.main = dict(folders), main
        for other in self.folders.values():
            _check_tokenizer(main, other)

    @classmethod
    def open(cls, section: DataSection) -> "TrainingData":
        """Open and check the folders that a recipe names. Raises DataError, which lists all folders that fail."""
        folders, failed = {}, []
        for label, path in folder_paths(section.sources).items():
            try:
                folders[label] = DataFolder.open(path)
            except DataError as error:
                failed.append(error)
        if failed:
            raise failed[0] if len(failed) == 1 else DataError("\n".join(str(error) for error in failed))
        return cls(folders, list(folders.values())[section.sources.index(section.main)])

    @property
    def mixed(self) -> bool:
        return len(self.folders) > 1

    @property
    def tokenizer(self) -> Tokenizer:
        return self.main.tokenizer

    @property
    def chat(self) -> DataFolder | None:
        """The first folder of conversations; None if all hold texts."""
        return next((folder for folder in self.folders.values() if folder.manifest.chat is not None), None)

    @property
    def end_of_text_id(self) -> int:
        return self.main.manifest.end_of_text_id

    def streams(self, split: Split) -> dict[str, TokenStream]:
        """Return the token stream of `train` or `val` of each folder; some may be empty."""
        return {label: folder.split(split) for label, folder in self.folders.items()}

    def tokens(self, split: Split) -> int:
        """Return the tokens of a split of all folders."""
        return sum(map(len, self.streams(split).values()))


def folder_paths(names: Iterable[str]) -> dict[str, Path]:
    """Return the folders that a recipe names, by label: the last part of a path, or all of it where two are alike.

    Raises DataError where two names mean one folder.
    """
    paths = {name: resolve_dataset(name) for name in names}
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if (other := seen.setdefault(path.resolve(), name)) != name:
            raise DataError(f"{other} and {name} are one folder, {path}; name it once, with the sum of its weights")
    short = [path.name for path in paths.values()]
    unique = {name for name, path in paths.items() if path.name and short.count(path.name) == 1}
    return {path.name if name in unique else name: path for name, path in paths.items()}


def _check_tokenizer(first: DataFolder, other: DataFolder) -> None:
    """Raise DataError where two folders hold tokens of different tokenizers."""
    one, two = first.manifest, other.manifest
    if (one.tokenizer_sha256, one.end_of_text_id) == (two.tokenizer_sha256, two.end_of_text_id):
        return
    sizes = f"{one.vocab_size:,} entries, end-of-text {one.end_of_text_id}; {two.vocab_size:,}, {two.end_of_text_id}"
    raise DataError(
        f"{first.path} and {other.path} have different tokenizers ({sizes}), so they cannot be mixed; prepare one of "
        f"them again with the other's: --tokenizer {first.path / 'tokenizer.json'}"
    )
