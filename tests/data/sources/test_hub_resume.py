"""An interrupted preparation from the Hub resumes at its commit and fetches only what is missing."""

from pathlib import Path

import pytest

from lightlm.data.prepare import blocks
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import parquet as footers
from lightlm.data.sources.hub.client import HubError
from lightlm.data.sources.registry import open_source
from tests.hub import Fault, Hub
from tests.hub_data import DOCUMENTS, REPO, make_fineweb_edu


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_resumes_at_its_commit(
    hub: Hub, fineweb_edu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)  # a block for each row group
    commit = hub.add(REPO, fineweb_edu)
    reference = prepare("fineweb-edu", "train:300", tmp_path / "reference", workers=1)
    hub.faults.append(Fault("status", r"/cdn/.*002_0.*", times=0))

    def fail_after_the_footer(line: str) -> None:
        if "/cdn/" in line and "002_0" in line:
            seen.append(line)
            hub.faults[0].times = 99 if len(seen) > 5 else 0

    # The tokenizer is trained on all texts, which reads the last file once: a footer and three row groups.
    seen: list[str] = []
    footers._footer.cache_clear()
    hub.before_request = fail_after_the_footer
    with pytest.raises(HubError, match=r"002_00000\.parquet .*failed 5 times"):
        prepare("fineweb-edu", "train:300", tmp_path / "data", workers=1)

    hub.clear()
    hub.before_request = None
    hub.add(REPO, make_fineweb_edu(tmp_path / "newer", [f"new {text}" for text in DOCUMENTS]))
    footers._footer.cache_clear()
    manifest = prepare("fineweb-edu", "train:300", tmp_path / "data", workers=1)
    assert manifest.revision == commit == reference.revision
    assert contents(tmp_path / "data") == contents(tmp_path / "reference")
    fetched = [r.path[-17:-8] for r in hub.requests if "/cdn/" in r.path]
    assert fetched.count("000_00000") == fetched.count("001_00000") == 1  # their footers
    assert fetched.count("002_00000") in {3, 4}
    assert not any("/revision/main" in r.path for r in hub.requests)  # where the branch points now does not matter


@pytest.mark.parametrize("stage", ["footer", "row group"])
def test_a_failing_hub_is_not_bad_data_to_skip(hub: Hub, fineweb_edu: Path, tmp_path: Path, stage: str) -> None:
    hub.add(REPO, fineweb_edu)
    if stage == "row group":
        list(open_source("fineweb-edu").units())  # keeps the footers
    hub.faults.append(Fault("status", r"/cdn/.*001_0", times=99))
    with pytest.raises(HubError, match=r"001_00000\.parquet .*failed 5 times"):
        prepare("fineweb-edu", "train:300", tmp_path / "data", workers=1, skip_bad=True)
