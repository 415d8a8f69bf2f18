"""A tiny model behind a real server on a free port of this machine."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lightlm.checkpoint import LoadedModel
from lightlm.generate.engine import generate
from lightlm.generate.sampling import Sampling
from lightlm.serve.access import Access
from lightlm.serve.app import Service
from lightlm.serve.loop import Limits
from lightlm.serve.server import listen, serving, url_of
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer

PROMPT = "The cat sat"


@dataclass
class Served:
    """A running server: its parts, and a client."""

    loaded: LoadedModel
    service: Service
    url: str
    client: httpx.Client

    def complete(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": PROMPT, **fields})

    def texts(self, **fields: Any) -> list[str]:
        response = self.complete(**fields)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]

    def events(self, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end as OpenAI's clients expect."""
        body = {"stream": True, **({} if "messages" in fields else {"prompt": PROMPT}), **fields}
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *lines, last = response.text.removesuffix("\n\n").split("\n\n")
        assert last == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def alone(self, prompts: list[str], tokens: int, sampling: Sampling, seed: int, samples: int = 1) -> list[str]:
        """The texts that the Python API generates from the same seed, without a server."""
        tokenizer = self.loaded.tokenizer
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        stop_ids = {tokenizer.end_of_text_id}
        made = generate(self.loaded.model, ids, tokens, sampling, seed, stop_ids, num_samples=samples)
        return [tokenizer.decode(completion.ids) for completion in made]

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def tiny_loaded(**shape: Any) -> LoadedModel:
    tokenizer = tiny_tokenizer()
    return LoadedModel(tiny_model(tokenizer, **{"max_seq_len": 256, **shape}), tokenizer, Path("tiny"))


@contextlib.contextmanager
def served(
    limits: Limits | None = None,
    access: Access | None = None,
    loaded: LoadedModel | None = None,
    reference: str | None = None,
) -> Iterator[Served]:
    loaded = loaded or tiny_loaded()
    service = Service(loaded, limits or Limits(), access or Access(), reference)
    listening = listen("127.0.0.1", 0)
    url = url_of(listening)
    with serving(service, listening), httpx.Client(base_url=url, timeout=60) as client:
        yield Served(loaded, service, url, client)


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    over = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < over, "it did not become true"
        time.sleep(0.01)
