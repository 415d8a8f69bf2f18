"""What a server does at most, and that clients that go, break off or dawdle leave it serving."""

import json
import socket
import threading
import time

import pytest

from lightlm.generate.sampling import DEFAULT
from lightlm.serve import app
from lightlm.serve import server as server_module
from lightlm.serve.loop import Limits
from tests.serve.served import PROMPT, Served, served, tiny_loaded, wait_until

LONG = {"max_tokens": 4000, "logit_bias": {"7": 100}, "temperature": 0}


@pytest.fixture(scope="module")
def small():
    """Two rows and a queue of three; answers can be long."""
    with served(Limits(rows=2, waiting=3), loaded=tiny_loaded(max_seq_len=5000)) as running:
        yield running


def raw_request(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def connect(server: Served) -> socket.socket:
    url = server.client.base_url
    return socket.create_connection((url.host, url.port), timeout=20)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_rows(small: Served, stream: bool) -> None:
    with connect(small) as client:
        client.sendall(raw_request({"prompt": PROMPT, "n": 2, "stream": stream, **LONG}))
        wait_until(lambda: small.metric("lightlm_rows_used") == 2)
        if stream:
            assert client.recv(50)
    wait_until(lambda: small.metric("lightlm_rows_used") == 0)
    assert small.texts(max_tokens=1)


def test_a_client_that_goes_while_it_waits_leaves_the_queue(small: Served) -> None:
    with connect(small) as first, connect(small) as second:
        first.sendall(raw_request({"prompt": PROMPT, "n": 2, "stream": True, **LONG}))
        wait_until(lambda: small.metric("lightlm_rows_used") == 2)
        second.sendall(raw_request({"prompt": PROMPT, "stream": True, **LONG}))
        wait_until(lambda: small.metric("lightlm_rows_waiting") == 1)
        second.close()
        wait_until(lambda: small.metric("lightlm_rows_waiting") == 0)
        assert small.metric("lightlm_rows_used") == 2
    wait_until(lambda: small.metric("lightlm_rows_used") == 0)


def test_a_full_queue_says_so_and_keeps_what_runs(small: Served) -> None:
    with connect(small) as client:
        client.sendall(raw_request({"prompt": PROMPT, "n": 5, "stream": True, **LONG}))
        wait_until(lambda: small.metric("lightlm_rows_waiting") == 3)
        response = small.complete(max_tokens=1)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
        assert small.metric("lightlm_rows_waiting") == 3
        response = small.complete(n=6)
        assert response.status_code == 400
        assert "at most 5" in response.json()["error"]["message"]
    wait_until(lambda: small.metric("lightlm_rows_used") == 0)


def test_more_choices_than_rows_take_turns(small: Served) -> None:
    fields = {"max_tokens": 6, "seed": 3}
    assert small.texts(n=5, **fields)[:2] == small.texts(n=2, **fields)


@pytest.mark.parametrize(("stream", "n"), [(True, 1), (False, 2)])
def test_an_answer_that_takes_too_long_ends_with_an_error(stream: bool, n: int) -> None:
    with served(Limits(rows=1, waiting=3, seconds=0.5), loaded=tiny_loaded(max_seq_len=9000)) as server:
        fields = {**LONG, "max_tokens": 8900, "n": n}  # the second one waits
        if stream:
            error = server.events(**fields)[-1]["error"]
        else:
            response = server.complete(**fields)
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["code"] == "timeout"
        wait_until(lambda: server.metric("lightlm_rows_used") + server.metric("lightlm_rows_waiting") == 0)
        assert server.texts(max_tokens=1)


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server: Served) -> None:
    with connect(server) as client:
        client.sendall(raw_request({}).replace(b"Content-Length: 2", b"Content-Length: 99999999"))
        assert b" 413 " in client.recv(200)
    chunks = (b"x" * 65536 for _ in range(100))
    response = server.client.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_slow_requests_are_cut_off(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    with connect(server) as silent, connect(server) as slow_head, connect(server) as slow_body:
        slow_head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        slow_body.sendall(raw_request({"prompt": PROMPT})[:-5])
        assert server.texts(max_tokens=1)
        assert silent.recv(100) == b""
        assert slow_head.recv(100) == b""
        assert b" 408 " in slow_body.recv(1000)


def test_a_kept_connection_with_a_slow_second_request_is_cut_off(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.5)
    with connect(server) as client:
        client.sendall(raw_request({"prompt": PROMPT, "max_tokens": 1}))
        assert b" 200 " in client.recv(2000)
        client.sendall(b"GET / HT")
        rest = b"x"
        while rest:
            rest = client.recv(2000)


def test_a_client_that_reads_slowly_gets_everything(small: Served) -> None:
    with connect(small) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(raw_request({"prompt": PROMPT, "stream": True, **LONG, "max_tokens": 600}))
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += client.recv(3000)
            time.sleep(0.001)
    assert received.count(b'"object":"text_completion"') == 600
    assert b"data: [DONE]" in received


def test_a_failing_step_ends_its_answers_and_not_the_server(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def step(*args: object) -> None:
        failed.set()
        raise RuntimeError("the device is out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("lightlm.generate.batch.Batch.step", step)
        response = server.complete(max_tokens=5)
    assert failed.is_set()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert server.texts(max_tokens=5, seed=1) == server.alone([PROMPT], 5, DEFAULT, 1)


def test_the_end_of_the_server_ends_open_streams_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.3)
    received: list[bytes] = []
    with served(Limits(rows=1, waiting=2), loaded=tiny_loaded(max_seq_len=20_000)) as server:

        def read() -> None:
            with connect(server) as client:
                client.sendall(raw_request({"prompt": PROMPT, "n": 2, "stream": True, **LONG, "max_tokens": 19_000}))
                while part := client.recv(65536):
                    received.append(part)
                    if part.endswith(b"0\r\n\r\n"):
                        return

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: sum(map(len, received)) > 1000)
    reader.join(20)
    assert not reader.is_alive()
    last = b"".join(received)[-300:]
    assert b"shutting_down" in last
    assert b"data: [DONE]" in last
    assert last.endswith(b"0\r\n\r\n")


def test_an_answer_that_has_begun_may_finish() -> None:
    with served(Limits(rows=1)) as server:
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.extend(server.texts(max_tokens=200, logit_bias={"7": 100})))
        reader.start()
        wait_until(lambda: server.metric("lightlm_rows_used") == 1)
        server.service.loop.refuse()
        assert server.client.get("/health").status_code == 503
        assert server.complete().status_code == 503
        reader.join(20)
    assert len(texts) == 1
