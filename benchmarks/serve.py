"""Load on `lightlm serve`: streaming clients, or malformed requests and clients that break off.

    python benchmarks/serve.py runs/demo --clients 32 --seconds 60
    python benchmarks/serve.py runs/demo --malformed 1000

Starts a server of its own. The first form prints percentiles of the time to the first token, between tokens and of
whole answers, and compares each answer with what the same seed gives alone in this process. The second form prints how
often each status was answered. Both end with an error if anything is wrong. Clients and server share the cores.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from common import make_parser, report

TEXTS = ("The", "Return a new", "If the argument is", "In this example we", "Note that", "Once upon a time there was a")
JSON = "Content-Type: application/json\r\n"


@contextlib.contextmanager
def running(model: str, *options: str) -> Iterator[str]:
    """Context manager with a server; returns its address."""
    command = [sys.executable, "-m", "lightlm", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if " answers at " in line), None)
        if line is None:
            raise SystemExit("the server did not start")
        yield line.partition(" answers at ")[2].split()[0]
        process.terminate()
        if process.wait(30) != 0:
            raise SystemExit(f"the server ended with {process.returncode}: {process.stderr.read()}")
    finally:
        process.kill()


def questions(count: int, tokens: int) -> list[dict[str, Any]]:
    """Return different requests, of which some are greedy and some draw from all tokens."""
    source = random.Random(0)
    return [
        {
            "prompt": source.choice(TEXTS) * source.randrange(1, 5),
            "max_tokens": source.randrange(8, tokens),
            "seed": seed,
            "temperature": source.choice((0, 0.7, 1.0)),
            "top_p": source.choice((0.9, 1.0)),
        }
        for seed in range(count)
    ]


async def load(url: str, asked: list[dict[str, Any]], clients: int, seconds: float) -> list[dict[str, Any]]:
    """Let clients ask one request after the other, and return what each got, with the times of its tokens."""
    over, order, answers = time.monotonic() + seconds, iter(range(10**9)), []

    async def ask(client: httpx.AsyncClient) -> None:
        while time.monotonic() < over:
            number = next(order) % len(asked)
            answer = {"number": number, "text": "", "start": time.monotonic(), "times": [], "reason": None}
            answers.append(answer)
            body = {**asked[number], "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        [choice] = json.loads(line[6:])["choices"]
                        answer["text"] += choice["text"]
                        answer["reason"] = choice["finish_reason"]
                        answer["times"].append(time.monotonic())

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return answers


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the median, the 90th and the 99th percentile in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{percent}": round(1000 * cuts[percent - 1], 1) for percent in (50, 90, 99)}


def alone(model: str, dtype: str, asked: list[dict[str, Any]]) -> list[str]:
    """Return what each request gives by itself, through the Python API."""
    import torch

    from lightlm.generate.engine import generate
    from lightlm.generate.load import load_for_decoding
    from lightlm.generate.prompts import encode_prompt
    from lightlm.generate.sampling import Sampling
    from lightlm.generate.text import text_of

    loaded = load_for_decoding(model, torch.device("cpu"), dtype, None)
    tokenizer, texts = loaded.tokenizer, []
    for fields in asked:
        ids = encode_prompt(tokenizer, fields["prompt"])
        sampling = Sampling(temperature=fields["temperature"], top_p=fields["top_p"])
        [made] = generate(
            loaded.model,
            [ids],
            fields["max_tokens"],
            sampling,
            fields["seed"],
            tokenizer.end_ids,
            vocab_size=tokenizer.vocab_size,
        )
        texts.append(text_of(tokenizer, ids, made.ids))
    return texts


def measure_load(
    model: str, dtype: str, clients: int, seconds: float, rows: int, kinds: int, tokens: int
) -> dict[str, Any]:
    asked = questions(kinds, tokens)
    options = ("--device", "cpu", "--dtype", dtype, "--batch-size", str(rows), "--max-queue", str(clients))
    with running(model, *options) as url:
        answers = asyncio.run(load(url, asked, clients, seconds))
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    metrics = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    expected = alone(model, dtype, asked)
    wrong = [answer for answer in answers if answer["text"] != expected[answer["number"]] or not answer["reason"]]
    taken = max(answer["times"][-1] for answer in answers) - min(answer["start"] for answer in answers)
    events = sum(len(answer["times"]) for answer in answers)
    result = {
        "dtype": dtype,
        "clients": clients,
        "rows": rows,
        "seconds": round(taken, 1),
        "answers": len(answers),
        "wrong answers": len(wrong),
        "events per second": round(events / taken, 1),
        "first token, ms": percentiles([answer["times"][0] - answer["start"] for answer in answers]),
        "between tokens, ms": percentiles(
            [after - before for answer in answers for before, after in itertools.pairwise(answer["times"])]
        ),
        "whole answer, ms": percentiles([answer["times"][-1] - answer["start"] for answer in answers]),
        "mean step, ms": round(1000 * metrics["lightlm_step_seconds_sum"] / metrics["lightlm_step_seconds_count"], 1),
        "rows used at the end": metrics["lightlm_rows_used"],
    }
    for answer in wrong[:3]:
        print(
            f"wrong: {asked[answer['number']]}\n  {answer['text']!r}\n  {expected[answer['number']]!r}", file=sys.stderr
        )
    return result


def malformed(source: random.Random) -> tuple[bytes, str]:
    """Return the bytes of a request that is wrong in some way, and how the client ends it."""
    values = (None, True, -1, 0, 1e308, 2**70, "", "x" * 9, [], [[]], [None], {}, {"a": [1]})
    names = ("prompt", "max_tokens", "n", "stop", "seed", "temperature", "top_p", "logprobs", "stream", "echo", "model")
    body: dict[str, Any] = {"prompt": "The", "max_tokens": 4}
    body |= {source.choice((*names, "nonsense", "tools")): source.choice(values) for _ in range(source.randrange(1, 4))}
    content = json.dumps(body).encode()
    kind = source.choice(("fields", "fields", "bytes", "cut", "huge", "head", "early", "slow"))
    if kind == "bytes":
        content = bytes(source.randrange(256) for _ in range(source.randrange(200)))
    elif kind == "cut":
        content = content[: source.randrange(len(content))]
    elif kind == "huge":
        content = b'{"prompt": "' + b"x" * source.choice((1_000_000, 3_000_000)) + b'"}'
    path = source.choice(("/v1/completions", "/v1/chat/completions"))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {len(content)}\r\n\r\n".encode()
    if kind == "head":
        changed = bytearray(head)
        for _ in range(source.randrange(1, 9)):
            changed[source.randrange(len(changed))] = source.randrange(256)
        head = bytes(changed)
    if kind == "early":
        whole = head + content
        return whole[: source.randrange(len(whole))], "early"
    return head + content, kind


def send_malformed(url: str, count: int) -> Counter[str]:
    """Send malformed requests and return how often each kind got each status."""
    host, port = url.removeprefix("http://").split(":")
    source, seen = random.Random(0), Counter[str]()
    idle = [socket.create_connection((host, int(port))) for _ in range(50)]  # which never send a whole request
    for slow in idle:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: l")
    for _ in range(count):
        data, kind = malformed(source)
        with socket.create_connection((host, int(port)), timeout=60) as client:
            try:
                if kind == "slow":
                    for i in range(0, len(data), 16):
                        client.sendall(data[i : i + 16])
                else:
                    client.sendall(data)
                if kind == "early":
                    seen["early: gone"] += 1
                    continue
                if kind == "head":  # it may announce a longer body than there is
                    client.shutdown(socket.SHUT_WR)
                status = client.recv(4096)[9:12].decode(errors="replace")
            except OSError as error:  # the server closes where it need not read on
                status = type(error).__name__
        seen[f"{kind}: {status or 'closed'}"] += 1
    for slow in idle:
        slow.close()
    return seen


def measure_malformed(model: str, count: int) -> dict[str, Any]:
    with running(model) as url:
        [body] = questions(1, 20)
        before = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        seen = send_malformed(url, count)
        after = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        health = httpx.get(f"{url}/health").status_code
    if after != before or health != 200:
        raise SystemExit("the server does not answer as before")
    return {"requests": count, "status by kind": dict(sorted(seen.items())), "health at the end": health}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", help="run, checkpoint or Hugging Face folder; a small one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows", type=int, default=16, help="--batch-size of the server")
    parser.add_argument("--kinds", type=int, default=50, help="different requests")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--malformed", type=int, default=0, help="send so many malformed requests instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in both processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends, too
    if options.malformed:
        result = measure_malformed(options.model, options.malformed)
        failed = [kind for kind in result["status by kind"] if kind.partition(": ")[2].startswith("5")]
    else:
        result = measure_load(
            options.model, options.dtype, options.clients, options.seconds, options.rows, options.kinds, options.tokens
        )
        failed = ["wrong answers"] if result["wrong answers"] else []
    report(result, options.out)
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    main()
