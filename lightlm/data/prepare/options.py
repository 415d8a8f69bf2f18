"""The options of a preparation, their ranges, and those that determine the content of the folder."""

from dataclasses import dataclass
from typing import get_args

import xxhash

from lightlm.data.prepare.blocks import DocumentFilter
from lightlm.data.prepare.encoders import AUTO
from lightlm.data.prepare.workspace import Setting
from lightlm.data.select.decontamination import Decontaminator
from lightlm.data.select.deduplication import Mode, Signer
from lightlm.data.select.filters import Filter
from lightlm.data.shards import TrainOn
from lightlm.data.sources.base import Source
from lightlm.data.sources.pydocs import PYDOCS
from lightlm.data.sources.skills import SKILLS_SOURCE
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.folder import read_settings, tokenizer_folder
from lightlm.data.tokenizer.named import requested_vocab_size, tokenizer_path
from lightlm.errors import UsageError

SHARD_TOKENS = 100_000_000  # 200 MB, the shard size of llm.c and modded-nanogpt

_DEFAULTS = {PYDOCS: ("train:8192", 0.05), SKILLS_SOURCE: ("train:512", 0.02)}


def defaults(source: Source) -> tuple[str, float]:
    """Return the tokenizer and the share of validation documents of a preparation that names none.

    pydocs must work without a network, and its 9 MB are too little for a vocabulary of 50,257. Of its 1,600 documents
    0.5% would be 8, too few for a stable validation loss. skills, too, must work without a network; its few words need
    no vocabulary.
    """
    return _DEFAULTS.get(source.spec, ("gpt2", 0.005))


@dataclass(frozen=True)
class Options:
    """The options of a preparation; see `prepare`."""

    tokenizer: str
    text_column: str = "text"
    max_tokens: int | None = None
    val_fraction: float = 0.005
    shard_tokens: int = SHARD_TOKENS
    skip_bad: bool = False
    encoder: str = AUTO
    filters: tuple[DocumentFilter, ...] = ()
    dedup: Mode | None = None
    decontaminate: Decontaminator | None = None
    filter: Filter | None = None
    end_of_text: str | None = None
    train_on: TrainOn | None = None  # None: the documents are texts
    chat_template: str | None = None

    def check(self) -> None:
        """Raise UsageError where a value is out of its range, DataError where a package for an option is missing."""
        if not 0 <= self.val_fraction <= 1:
            raise UsageError(
                f"--val-fraction {self.val_fraction}: a number from 0 (no validation split) to 1 (nothing to train on) "
                "is needed"
            )
        if self.val_fraction == 1 and self.train_on is not None:
            raise UsageError(
                "--val-fraction 1 makes data that models are only scored on, and the task heldout does not score "
                "conversations; choose a smaller fraction"
            )
        if self.val_fraction == 1 and requested_vocab_size(self.tokenizer) is not None:
            raise UsageError(
                f"--val-fraction 1 leaves no text for --tokenizer {self.tokenizer}; name the tokenizer of the models "
                "that the data is for"
            )
        for option, value in (("--max-tokens", self.max_tokens), ("shard_tokens", self.shard_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value}: at least 1 is needed")
        if self.train_on not in (None, *get_args(TrainOn)):
            raise UsageError(f"train_on {self.train_on!r}: known are {', '.join(get_args(TrainOn))}")
        if self.train_on is None and self.chat_template is not None:
            raise UsageError("--chat-template is for conversations: add --format chat")
        requested_vocab_size(self.tokenizer)
        if self.end_of_text is not None and not self.end_of_text.strip():
            raise UsageError("--eot: name a token, for example '<|im_end|>'")
        if self.dedup is not None:
            Signer(self.dedup)

    def settings(self, source: Source) -> dict[str, Setting]:
        """Return what determines the content of the folder; everything else may change between two runs.

        A setting that an older version lacks is None at its default, so that older folders are recognized.
        """
        digest, end_of_text, template = None, self.end_of_text, self.chat_template
        # A local file may change under the same path.
        if requested_vocab_size(self.tokenizer) is None and (path := tokenizer_path(self.tokenizer)) is not None:
            tokenizer = Tokenizer.read(path, end_of_text=self.end_of_text)
            digest = f"sha256 {tokenizer.sha256}"
            end_of_text = None if tokenizer.end_of_text_id == tokenizer.known_end_of_text_id else tokenizer.end_of_text
            if self.train_on is not None and template is None and (folder := tokenizer_folder(path)) is not None:
                template = read_settings(folder).get("chat_template")
        return {
            "source": source.spec,
            "content": source.fingerprint,
            "tokenizer": digest or self.tokenizer,
            "text_column": self.text_column,
            "max_tokens": self.max_tokens,
            "val_fraction": self.val_fraction,
            "shard_tokens": self.shard_tokens,
            "filter": None if self.filter is None else self.filter.text,
            "decontaminate": None if self.decontaminate is None else self.decontaminate.identity,
            "end_of_text": end_of_text,
            "train_on": self.train_on,
            "chat_template": None if template is None else xxhash.xxh3_64_hexdigest(template.encode()),
            "dedup": None if self.dedup is None else Signer(self.dedup).method,
        }
