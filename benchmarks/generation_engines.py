"""The programs that generate.py compares: each runs the same weights, continues prompts and scores text.

To add one, write a class with the members of `Engine`, and give it a row in `ENGINES`. Packages are imported inside
methods: any may be missing.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Protocol

Prompts = list[list[int]]  # token ids; all of one length


class Engine(Protocol):
    """A program with a model loaded."""

    package: ClassVar[str]  # what must be installed

    @staticmethod
    def prepare(model: Path, folder: Path, precision: str) -> Path:
        """Return where the weights of a Hugging Face folder are in the program's form; write them if they are not."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        """Load what `prepare` returned."""

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        """Return `count` tokens after each prompt; an end of text ends nothing."""

    def log_likelihood(self, ids: list[int]) -> float | None:
        """Return the sum of the log-probabilities of all tokens but the first, or None if it cannot be asked for."""

    def processes(self) -> Sequence[int]:
        """Return the ids of the processes that hold the model."""


class _Here:
    """An engine in this process."""

    def processes(self) -> Sequence[int]:
        return [os.getpid()]


class LightLM(_Here):
    """LightLM itself; the precision `int8` rounds the weights when they are loaded."""

    package = "lightlm"

    @staticmethod
    def prepare(model: Path, folder: Path, precision: str) -> Path:
        return model

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import torch

        from lightlm.convert.load import load_pretrained

        torch.set_num_threads(threads)
        self.model = load_pretrained(path, dtype=getattr(torch, "float32" if precision == "int8" else precision)).model
        if precision == "int8":
            self.model.round_decoding_to("int8")

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        from lightlm.generate.engine import generate
        from lightlm.generate.sampling import Sampling

        completions = generate(self.model, prompts, count, Sampling(temperature=0.0))
        return [completion.ids for completion in completions]

    def log_likelihood(self, ids: list[int]) -> float:
        import torch

        from lightlm.generate.step.fast import forward_of

        with torch.no_grad():
            logits_1TV = forward_of(self.model)(torch.tensor([ids[:-1]]), self.model.new_cache(1, len(ids)))
            return _sum_of(logits_1TV[0], ids)


class Transformers(_Here):
    """Hugging Face transformers, eager, as a user calls it."""

    package = "transformers"
    prepare = LightLM.prepare

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, precision)).eval()

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        import torch

        tokens_BT = torch.tensor(prompts)
        settings: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        with torch.no_grad():
            out_BT = self.model.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), **settings)
        return out_BT[:, tokens_BT.shape[1] :].tolist()

    def log_likelihood(self, ids: list[int]) -> float:
        import torch

        with torch.no_grad():
            return _sum_of(self.model(torch.tensor([ids[:-1]])).logits[0], ids)


class LlamaCppServer:
    """llama.cpp's own server (xllamacpp), which decodes the requests that it has at a time in one batch.

    PyPI's wheels for Linux and Windows are built for CPUs with AVX2, without AVX-512 and AMX.
    """

    package = "xllamacpp"

    @staticmethod
    def prepare(model: Path, folder: Path, precision: str) -> Path:
        return gguf_file(model, folder, precision)

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        from lightlm.convert.gguf.header import read_header
        from lightlm.convert.gguf.llamacpp import llama_cpp

        self.vocab_size = read_header(path).tensors["token_embd.weight"].shape[0]
        self.stack = ExitStack()
        self.server = self.stack.enter_context(
            llama_cpp(path, positions=8 * 1024, sequences=8, threads=threads, exact=False)
        )
        self.pool = ThreadPoolExecutor(8)

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        return list(self.pool.map(lambda ids: self.server.continue_greedily(ids, count), prompts))

    def log_likelihood(self, ids: list[int]) -> float:
        return sum(self.server.log_prob(ids[:end], ids[end], self.vocab_size) for end in range(1, len(ids)))

    def processes(self) -> Sequence[int]:
        return [self.server.process.pid]


class OpenVINO(_Here):
    """OpenVINO GenAI, which reads GGUF files. It tells no probabilities of a prompt."""

    package = "openvino_genai"
    prepare = LlamaCppServer.prepare

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import openvino_genai

        self.pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        import numpy as np
        import openvino
        import openvino_genai

        ids_BT = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids_BT), openvino.Tensor(np.ones_like(ids_BT)))
        settings = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        return [list(row) for row in self.pipeline.generate(inputs, settings).tokens]

    def log_likelihood(self, ids: list[int]) -> float | None:
        return None


class ONNXRuntime(_Here):
    """ONNX Runtime GenAI, whose builder makes the graph of a Hugging Face folder (it needs onnx and onnx_ir)."""

    package = "onnxruntime_genai"

    @staticmethod
    def prepare(model: Path, folder: Path, precision: str) -> Path:
        out = folder / f"onnx-{precision}"
        if not (out / "genai_config.json").is_file():
            short = {"float32": "fp32"}.get(precision, precision)
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out, "-p", short]
            _run([*command, "-e", "cpu"], out)
        return out

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import onnxruntime_genai

        config = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        (path / "genai_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        self.model = onnxruntime_genai.Model(str(path))

    def _generator(self, prompts: Prompts, count: int) -> Any:
        import numpy as np
        import onnxruntime_genai

        settings = onnxruntime_genai.GeneratorParams(self.model)
        length = len(prompts[0]) + count
        settings.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
        generator = onnxruntime_genai.Generator(self.model, settings)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        return generator

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        generator = self._generator(prompts, count)
        for _ in range(count):
            generator.generate_next_token()
        return [list(generator.get_sequence(row))[-count:] for row in range(len(prompts))]

    def log_likelihood(self, ids: list[int]) -> float:
        import torch

        return _sum_of(torch.tensor(self._generator([ids[:-1]], 1).get_output("logits"))[0], ids)


class CTranslate2(_Here):
    """CTranslate2, whose converter reads a Hugging Face folder through transformers."""

    package = "ctranslate2"

    @staticmethod
    def prepare(model: Path, folder: Path, precision: str) -> Path:
        out = folder / f"ctranslate2-{precision}"
        if not (out / "model.bin").is_file():
            from ctranslate2.converters import TransformersConverter

            TransformersConverter(str(model)).convert(str(out), quantization=precision, force=True)
            shutil.copy(model / "tokenizer.json", out)
        return out

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import ctranslate2
        import tokenizers

        self.generator = ctranslate2.Generator(str(path), device="cpu", intra_threads=threads, compute_type=precision)
        self.name_of = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).id_to_token

    def continue_greedily(self, prompts: Prompts, count: int) -> Prompts:
        names = [[self.name_of(index) for index in ids] for ids in prompts]
        settings: dict[str, Any] = {"max_length": count, "min_length": count, "sampling_topk": 1}
        results = self.generator.generate_batch(names, include_prompt_in_result=False, **settings)
        return [list(result.sequences_ids[0]) for result in results]

    def log_likelihood(self, ids: list[int]) -> float:
        [result] = self.generator.score_batch([[self.name_of(index) for index in ids]])
        return float(sum(result.log_probs))


# Engine and precision by the name in the table. The first rows are LightLM's; add a variant there.
ENGINES: dict[str, tuple[type[Any], str]] = {
    "LightLM float32": (LightLM, "float32"),
    "LightLM bfloat16": (LightLM, "bfloat16"),
    "LightLM int8": (LightLM, "int8"),
    "transformers float32": (Transformers, "float32"),
    "transformers bfloat16": (Transformers, "bfloat16"),
    "llama.cpp f16": (LlamaCppServer, "float16"),
    "llama.cpp q8_0": (LlamaCppServer, "q8_0"),
    "OpenVINO f16": (OpenVINO, "float16"),
    "OpenVINO q8_0": (OpenVINO, "q8_0"),
    "ONNX Runtime float32": (ONNXRuntime, "float32"),
    "ONNX Runtime int4": (ONNXRuntime, "int4"),
    "CTranslate2 float32": (CTranslate2, "float32"),
    "CTranslate2 int8": (CTranslate2, "int8"),
}


def missing(name: str) -> str:
    """Return the package that an engine lacks, or an empty text."""
    package = ENGINES[name][0].package
    return "" if importlib.util.find_spec(package) else str(package)


def gguf_file(model: Path, folder: Path, precision: str) -> Path:
    """Return a GGUF file of a Hugging Face folder's weights, written by LightLM."""
    from lightlm.convert.gguf.file import export_gguf
    from lightlm.convert.load import load_pretrained

    out = folder / f"{precision}.gguf"
    if not out.is_file():
        export_gguf(load_pretrained(model), out, precision)
    return out


def _run(command: list[Any], out: Path) -> None:
    """Run a command that makes a folder; raise RuntimeError with its last line, and leave no folder, if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(out, ignore_errors=True)
        raise RuntimeError(next(iter(result.stderr.strip().splitlines()[-1:]), "no reason given"))


def _sum_of(logits_TV: Any, ids: list[int]) -> float:
    """Return the log-likelihood of ids[1:], given the logits after each token but the last."""
    import torch

    log_probs_TV = logits_TV.float().log_softmax(-1)
    return float(log_probs_TV.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
