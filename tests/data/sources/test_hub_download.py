"""Downloads for machines without a network, and the names of data sets."""

import shutil
from pathlib import Path

import pytest

from lightlm.data.sources.hub.client import HubError
from lightlm.data.sources.hub.names import HUB_DATASETS, parse_hub
from lightlm.errors import DataError
from tests.hub import Fault, Hub
from tests.hub_data import DOCUMENTS, REPO, read, source


def test_a_download_survives_faults_and_serves_without_a_network(
    hub: Hub, fineweb_edu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(REPO, fineweb_edu)
    hub.faults += [Fault("drop", "/cdn/.*000_0", times=2), Fault("status", "/cdn/.*001_0", status=502)]
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    listing = source().download()
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert len(listing.files) == 3

    hub.clear()
    source().download()
    assert hub.body_bytes("/cdn/") == 0  # nothing is fetched twice

    hub.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    opened = source()
    assert read(opened) == DOCUMENTS
    assert opened.revision == commit
    assert [unit.id for unit in opened.units()][3] == "sample/10BT/001_00000.parquet#row_group=0"
    assert read(source().at_revision(commit)) == DOCUMENTS
    assert not hub.requests
    with pytest.raises(DataError, match=r"at commit 0123abc is not in the cache .*--download-only"):
        source().at_revision("0123abc").units().__next__()
    with pytest.raises(
        DataError,
        match=r"hf:HuggingFaceFW/fineweb-edu:sample-100BT is not in the cache at .*: lightlm "
        r"prepare-data hf:HuggingFaceFW/fineweb-edu:sample-100BT --download-only",
    ):
        list(source("fineweb-edu:100BT").units())


def test_an_unfinished_download_names_the_missing_files(
    hub: Hub, fineweb_edu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, fineweb_edu)
    hub.faults.append(Fault("status", "/cdn/.*002_0", times=99))
    with pytest.raises(HubError, match=r"Downloading .*002_00000\.parquet .*failed 5 times in a row \(.*500"):
        source().download()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"1 of the 3 files .*002_00000\.parquet.*sample-10BT --download-only"):
        list(source().units())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.clear()
    assert read(source()) == DOCUMENTS  # online, what is in the cache is read there
    cached = {path for path, _ in source().listing.files if source().listing.cached(path)}
    assert not any(path in r.path for r in hub.requests for path in cached)


def test_a_download_needs_room(hub: Hub, fineweb_edu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, fineweb_edu)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"needs 0\.0 GB, and the disk of .* Set HF_HOME"):
        source().download()
    assert not any("/cdn/" in r.path for r in hub.requests)


@pytest.mark.parametrize("name", [name for name, named in HUB_DATASETS.items() if not named.without_text])
def test_every_short_name_has_a_long_form(name: str) -> None:
    request = parse_hub(name, "text")
    assert request is not None
    assert request.name == name
    long = parse_hub(request.spec, request.text_column)
    assert long is not None
    assert (long.repo, long.config) == (request.repo, request.config)


def test_a_named_data_set_knows_its_text_column() -> None:
    for column, expected in (("text", "page"), ("title", "title")):
        request = parse_hub("wikitext-103", column)
        assert request is not None
        assert request.text_column == expected
