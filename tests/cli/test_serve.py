import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.cli.runner import Runner
from tests.evaluate.tiny_run import write_world

pytest.importorskip("uvicorn", reason="needs the extra [serve]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, max_seq_len=100)
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.delenv("LIGHTLM_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "LIGHTLM_API_KEY"),
        (["--host", "0.0.0.0", "--api-key", ""], "--api-key"),
        (["--cors", "example.org"], "--cors example.org"),
        (["--device", "abacus"], "abacus"),
        (["nosuch"], "nosuch"),
        (["--weights", "raw"], "one set of weights"),
    ],
)
def test_mistakes_are_one_message(lightlm: Runner, arguments: list[str], words: str) -> None:
    lightlm("serve", *arguments).assert_one_message(words)


def test_the_extra_is_named_where_it_is_missing(lightlm: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlm.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    lightlm("serve").assert_one_message("needs uvicorn; run", '--editable ".[serve]"')


def test_a_port_in_use_or_an_address_of_another_machine_is_one_message(lightlm: Runner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        lightlm("serve", "--port", port).assert_one_message(f"port {port} is in use", "--port")
    lightlm("serve", "--host", "192.0.2.1", "--api-key", "k").assert_one_message("192.0.2.1", "127.0.0.1")
    lightlm("serve", "--host", "no.such.host.invalid", "--api-key", "k").assert_one_message("no.such.host.invalid")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_process_answers_and_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "LIGHTLM_API_KEY": "secret"}
    command = [sys.executable, "-m", "lightlm", "serve", "demo", "--port", "0", "--batch-size", "2"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "answers at" in line)
        assert line.startswith("demo/step_000007 answers at http://127.0.0.1:")
        url = line.split()[3]
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        body = json.dumps({"model": "demo", "prompt": "The cat", "max_tokens": 3, "logit_bias": {"7": 100}}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        process.send_signal(number)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
