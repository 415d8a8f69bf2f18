"""Run a GGUF file in llama.cpp: the package xllamacpp in a process of its own, asked through its HTTP server.

A process of its own, because llama.cpp ends the process that it is in where a file is not as it expects, takes over
Ctrl-C, and writes to standard error. The server listens on this machine only and demands a key.
"""

import contextlib
import json
import os
import secrets
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightlm.errors import ConvertError
from lightlm.processes import python_command, python_environment

_ANSWER_SECONDS = 600
# Reads its settings, prints the server's address when the model is loaded, and ends when its standard input does.
_CHILD = """
import json, sys
import xllamacpp
settings = json.loads(sys.stdin.readline())
params = xllamacpp.CommonParams()
params.model.path = settings["path"]
params.api_keys = [settings["key"]]
params.n_ctx, params.n_parallel, params.kv_unified = settings["positions"], settings["sequences"], True
params.n_batch = params.n_ubatch = settings["batch"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
params.warmup = params.ui = params.fit_params = False
params.verbosity = 2
if settings["exact"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LlamaCpp:
    """A model that runs in llama.cpp."""

    address: str
    key: str
    process: subprocess.Popen[str]

    def ask(self, path: str, request: dict[str, Any]) -> Any:
        """Return the server's answer to a request; raise ConvertError if it refuses or has ended."""
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, data, headers), timeout=_ANSWER_SECONDS
            ) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ConvertError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')[:300]}") from None
        except (OSError, ValueError) as error:
            raise ConvertError(f"llama.cpp does not answer {path}: {error}") from None

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with what the file says comes before each; special tokens are not read from it."""
        return self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]

    def continue_greedily(self, ids: Sequence[int], count: int, banned: Iterable[int] = ()) -> list[int]:
        """Return the `count` likeliest tokens after a prompt, one by one, also past the end of a text.

        Neither a token that ends a text, by llama.cpp's own rules, nor one that is `banned` is among them.
        """
        request = {"prompt": list(ids), "n_predict": count, "temperature": 0.0, "return_tokens": True}
        request |= {"ignore_eos": True, "samplers": ["temperature"]}
        if bias := [[token, False] for token in banned]:
            request["logit_bias"] = bias
        return self.ask("/completion", request)["tokens"]

    def next_log_probs(self, ids: Sequence[int], vocab_size: int) -> list[float]:
        """Return the log-probability of every token after a prompt, (V,)."""
        step = self._sample(ids, self.tokenize("a")[-1], vocab_size)
        if step is None:
            raise ConvertError("llama.cpp gave no probabilities")
        log_probs = [float("-inf")] * vocab_size
        for entry in step["top_logprobs"]:
            log_probs[entry["id"]] = entry["logprob"]
        return log_probs

    def log_prob(self, ids: Sequence[int], target: int, vocab_size: int) -> float:
        """Return the log-probability of one token after a prompt; of growing prompts only the new part is computed."""
        step = self._sample(ids, target, 1)
        if step is None or step["id"] != target:
            return self.next_log_probs(ids, vocab_size)[target]
        return float(step["logprob"])

    def _sample(self, ids: Sequence[int], token: int, count: int) -> dict[str, Any] | None:
        """Return what the server says of the token after a prompt if it must be `token`, and of the `count` likeliest.

        The probabilities are those before the choice is forced. It is None where the server is silent: of a token that
        ends a text, and sometimes of one that is part of a character.
        """
        request = {"prompt": list(ids), "n_predict": 1, "temperature": 0.0, "n_probs": count, "cache_prompt": True}
        answer = self.ask("/completion", request | {"logit_bias": [[token, 1e9]], "samplers": ["temperature"]})
        return next(iter(answer.get("completion_probabilities", [])), None)


@contextlib.contextmanager
def llama_cpp(
    path: Path, *, positions: int, sequences: int = 1, batch: int = 512, threads: int = 0, exact: bool = True
) -> Iterator[LlamaCpp]:
    """Context manager that loads a file in llama.cpp.

    Args:
        positions: of all sequences together.
        sequences: how many are decoded at once.
        batch: tokens of prompts that are computed at once.
        threads: those of OMP_NUM_THREADS, or one per core, unless given.
        exact: keep keys and values in float32 and stay on the CPU, so that a float32 file is computed in float32.

    Raises:
        ConvertError: llama.cpp cannot load the file; the message has the reason that it prints.
    """
    key = secrets.token_hex(16)
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    settings = {"path": str(path.resolve()), "key": key, "positions": positions, "sequences": sequences}
    settings |= {"batch": batch, "threads": threads, "exact": exact}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            python_command("-c", _CHILD),
            env=python_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=os.name == "posix",  # Ctrl-C is for this process, which then ends the other
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(settings) + "\n")
                process.stdin.flush()
            address = process.stdout.readline().strip()
            if not address.startswith("http"):
                raise ConvertError(f"llama.cpp cannot load {path}: {_reason(log)}")
            yield LlamaCpp(address, key, process)
        finally:
            process.kill()
            process.communicate()


def _reason(log: IO[bytes]) -> str:
    """Return why llama.cpp failed, from what it printed."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    errors = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line]
    return (errors or lines[-1:] or ["it gave no reason"])[0]
