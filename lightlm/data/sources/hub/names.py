"""Names of data sets on the Hugging Face Hub: short ones, and hf:organization/name[:configuration][@revision]."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightlm.errors import DataError

PREFIX = "hf:"

# FineWeb's own samples of 10, 100 and 350 billion tokens, and everything.
_FINEWEB_SIZES = {"10BT": "sample-10BT", "100BT": "sample-100BT", "350BT": "sample-350BT", "full": "default"}


@dataclass(frozen=True)
class NamedDataset:
    """A data set with a short name.

    Attributes:
        configs: short names of configurations, in addition to the Hub's own.
        without_text: why the data set cannot be prepared, if it cannot.
    """

    repo: str
    config: str | None = None
    text_column: str = "text"
    configs: Mapping[str, str] = field(default_factory=dict)
    without_text: str | None = None


HUB_DATASETS: dict[str, NamedDataset] = {
    "fineweb-edu": NamedDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", configs=_FINEWEB_SIZES),
    "fineweb": NamedDataset("HuggingFaceFW/fineweb", "sample-10BT", configs=_FINEWEB_SIZES),
    "cosmopedia-v2": NamedDataset("HuggingFaceTB/smollm-corpus", "cosmopedia-v2"),
    "fineweb-edu-dedup": NamedDataset("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup"),
    "python-edu": NamedDataset(
        "HuggingFaceTB/smollm-corpus",
        "python-edu",
        without_text="it lists files of the Software Heritage archive by id (blob_id) and holds no text. Its page, "
        "https://huggingface.co/datasets/HuggingFaceTB/smollm-corpus, shows how to fetch the texts; prepare the folder "
        "of .jsonl or .parquet files that you write them to",
    ),
    # NVIDIA publishes ClimbMix as GPT-2 tokens; this is the text, shuffled, as nanochat trains on it.
    "climbmix": NamedDataset("karpathy/climbmix-400b-shuffle"),
    # Web pages that explain mathematics: those whose quality a classifier scores 4 of 5 or more, or 3 or more.
    "finemath": NamedDataset(
        "HuggingFaceTB/finemath", "finemath-4plus", configs={"3plus": "finemath-3plus", "4plus": "finemath-4plus"}
    ),
    "tinystories": NamedDataset("roneneldan/TinyStories"),
    # A row of Salesforce/wikitext is a line; a row here is an article.
    "wikitext-103": NamedDataset("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", text_column="page"),
    "openwebtext": NamedDataset("Skylion007/openwebtext"),
}


@dataclass(frozen=True)
class HubRequest:
    """A data set as the user asked for it. `name` is the data folder's default name; None means the Hub's default."""

    name: str
    repo: str
    config: str | None
    revision: str | None
    text_column: str

    @property
    def spec(self) -> str:
        """The long form of the name."""
        config = f":{self.config}" if self.config else ""
        return f"{PREFIX}{self.repo}{config}" + (f"@{self.revision}" if self.revision else "")


def parse_hub(spec: str, text_column: str) -> HubRequest:
    """Return what `spec`, a name in `HUB_DATASETS` or one with `PREFIX`, asks of the Hub.

    `text_column` is the user's; a named data set may have another one in place of the default `text`. Raises DataError
    for a malformed spec, and for a data set without text.
    """
    parts = re.fullmatch(r"(hf:[^/:@]+/[^/:@]+|(?!hf:)[^:@]+)(?::([^:@]+))?(?:@(.+))?", spec)
    if parts is None:
        raise DataError(
            f"{spec}: write a Hub data set as hf:organization/name or hf:organization/name:configuration, either one "
            "with @revision (a branch, tag or commit) at its end"
        )
    name, config, revision = parts.groups()
    _, _, last = name.rpartition("/")
    folder = re.sub(r"[^\w.-]+", "-", f"{last}-{config}" if config else last)
    if spec.startswith(PREFIX):
        return HubRequest(folder, name.removeprefix(PREFIX), config, revision, text_column)
    named = HUB_DATASETS[name]
    if named.without_text:
        raise DataError(f"{name} cannot be prepared: {named.without_text}.")
    column = named.text_column if text_column == "text" else text_column
    wanted = named.configs.get(config, config) if config else named.config
    return HubRequest(folder, named.repo, wanted, revision, column)
