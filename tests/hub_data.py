"""What the loopback Hub of `tests/hub.py` serves, and how the libraries of this process are pointed to it."""

import hashlib
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from lightlm.data.readers import parquet as footers
from lightlm.data.sources.hub.source import HubSource
from lightlm.data.sources.registry import open_source
from tests.corpus import read_unit
from tests.corpus import texts as corpus
from tests.hub import Hub

REPO = "HuggingFaceFW/fineweb-edu"
# Long, so that a file is larger than the 64 KB that pyarrow reads in search of a footer.
DOCUMENTS = [f"{number}: " + 20 * text for number, text in enumerate(corpus(90))]


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Point the libraries of this process to the server, with an empty cache, short timeouts and no waiting.

    They read HF_ENDPOINT and the like when they are imported; a process started with those variables needs no patch.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    patch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    patch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    patch.setattr("lightlm.data.sources.hub.client.RETRY_DELAYS", (0.0, 0.0, 0.0, 0.0))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    footers._footer.cache_clear()


FINEWEB_README = """---
license: odc-by
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: sample-100BT
  data_files:
  - split: train
    path: sample/100BT/*
- config_name: CC-MAIN-2013-20
  data_files:
  - split: train
    path: data/CC-MAIN-2013-20/*
---
# FineWeb-Edu
"""


def make_fineweb_edu(folder: Path, texts: list[str], files: int = 3, row_group: int = 10) -> Path:
    """A folder laid out like HuggingFaceFW/fineweb-edu, its columns included, with `texts` as sample-10BT."""
    share = -(-len(texts) // files)
    parts = {f"sample/10BT/{i:03d}_00000.parquet": texts[i * share : (i + 1) * share] for i in range(files)}
    parts["sample/100BT/000_00000.parquet"] = [f"sample-100BT {text}" for text in texts[:5]]
    parts["data/CC-MAIN-2013-20/train-00000-of-00001.parquet"] = [f"2013 {text}" for text in texts[:5]]
    parts["data/CC-MAIN-2025-26/000_00000.parquet"] = [f"2025 {text}" for text in texts[:5]]
    for name, documents in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ids = [hashlib.sha256(text.encode()).hexdigest() for text in documents]
        columns = {
            "text": documents,
            "id": [f"<urn:uuid:{identity}>" for identity in ids],
            "url": [f"https://example.org/{identity}/{identity[::-1]}" for identity in ids],
            "language_score": [0.9] * len(documents),
            "score": [2.5 + number % 4 * 0.5 for number in range(len(documents))],
        }
        parquet.write_table(pyarrow.table(columns), folder / name, row_group_size=row_group, compression="none")
    (folder / "README.md").write_text(FINEWEB_README, encoding="utf-8")
    return folder


def make_dataset(folder: Path, config: str, texts: list[str]) -> Path:
    """A data set with one configuration of one file, in a folder of its name."""
    (folder / config).mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": texts}), folder / config / "train-00000-of-00001.parquet")
    readme = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/*\n---\n"
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def source(spec: str = "fineweb-edu", text_column: str = "text") -> HubSource:
    opened = open_source(spec, text_column)
    assert isinstance(opened, HubSource)
    return opened


def read(source: HubSource) -> list[str]:
    return [text for unit in source.units() for text in read_unit(unit)]
