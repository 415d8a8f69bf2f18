"""`lightlm prepare-data fineweb-edu` as a user types it, in its own process, against a loopback Hub."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightlm.data.folder import DataFolder
from lightlm.data.tokenizer import train_tokenizer
from tests.corpus import texts
from tests.hub import Fault, Hub
from tests.hub_data import DOCUMENTS, REPO, make_fineweb_edu

COMMAND = [sys.executable, "-m", "lightlm", "prepare-data", "fineweb-edu"]


@pytest.fixture(scope="module")
def fineweb_edu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fineweb_edu(tmp_path_factory.mktemp("fineweb-edu"), DOCUMENTS)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    train_tokenizer(texts(90), 320).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def hub(fineweb_edu: Path, gpt2: Path) -> Iterator[Hub]:
    with Hub() as server:
        server.add(REPO, fineweb_edu)
        server.add("openai-community/gpt2", gpt2, kind="models")
        yield server


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    mine = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }
    return inherited | mine | more


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs the command in a new empty folder, or in `cwd`."""
    hub.clear()

    def invoke(*arguments: str, cwd: Path = tmp_path, **variables: str) -> subprocess.CompletedProcess[str]:
        cwd.mkdir(exist_ok=True)
        env = environment(hub, tmp_path / "home", **variables)
        return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    yield invoke
    hub.clear()
    hub.before_request = None


@pytest.fixture(scope="module")
def reference(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a run without faults, from a cold cache."""
    folder = tmp_path_factory.mktemp("reference")
    env = environment(hub, folder / "home")
    done = subprocess.run(COMMAND, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "data" / "fineweb-edu"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cold_run_writes_the_sample_and_pins_its_commit(hub: Hub, reference: Path, fineweb_edu: Path) -> None:
    folder = DataFolder.open(reference)
    texts = [folder.tokenizer.decode(ids) for split in ("train", "val") for ids in folder.split(split).documents()]
    assert "".join(texts) == "".join(DOCUMENTS)
    assert folder.manifest.source == f"hf:{REPO}:sample-10BT"
    assert folder.manifest.revision == hub.repositories[f"datasets/{REPO}"].branches["main"]
    folder.verify()


def test_a_finished_folder_needs_no_network(hub: Hub, run, reference: Path) -> None:  # type: ignore[no-untyped-def]
    before = contents(reference)
    again = run("--json", cwd=reference.parent.parent)
    assert json.loads(again.stdout)["status"] == "already prepared"
    assert not hub.requests
    assert contents(reference) == before


def test_faults_at_every_stage_change_nothing(hub: Hub, run, reference: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    hub.faults += [
        Fault("status", r"GET /api/datasets/.*/revision/main", status=503),
        Fault("status", "GET .*README"),
        Fault("status", r"resolve/.*/tokenizer.json", status=502),
        Fault("status", r"/resolve/.*000_0", status=429),
        Fault("close", r"/cdn/.*001_0"),
        Fault("drop", r"/cdn/.*002_0"),
    ]
    done = run()
    assert done.returncode == 0, done.stderr
    assert [fault for fault in hub.faults if fault.times] == []
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "data" / "fineweb-edu") == contents(reference)


def test_a_killed_run_leaves_nothing_half_done(hub: Hub, run, reference: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    hub.faults.append(Fault("slow", r"/cdn/.*002_0", seconds=60))
    process = subprocess.Popen(COMMAND, cwd=tmp_path, env=environment(hub, tmp_path / "home"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while hub.faults[0].times and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / "data" / "fineweb-edu").exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "data" / "fineweb-edu") == contents(reference)


def test_a_download_serves_a_machine_without_a_network(hub: Hub, run, reference: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused = run(HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    flat = " ".join(refused.stderr.split())
    assert "is not in the cache at" in flat
    assert "--download-only" in flat
    assert not hub.requests

    hub.faults.append(Fault("drop", r"/cdn/.*001_0"))
    fetched = run("--download-only", "--json")
    assert fetched.returncode == 0, fetched.stderr
    assert json.loads(fetched.stdout)["files"] == 3
    assert not (tmp_path / "data" / "fineweb-edu").exists()

    hub.clear()
    done = run(HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert contents(tmp_path / "data" / "fineweb-edu") == contents(reference)
