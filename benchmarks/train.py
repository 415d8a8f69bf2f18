"""Training speed of LightLM, transformers and nanoGPT: the same model, batch and precision, in turn, in one run.

    python benchmarks/train.py                                                   # the demo's shape
    python benchmarks/train.py --recipe lightlm --sequences 2 --length 1024 model.qk_norm=false
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/train.py --recipe gpt2-124m --sequences 4 --length 1024 --nanogpt nanoGPT \\
        --contestants "lightlm,transformers,nanogpt compiled"
    python benchmarks/train.py --isa amx,avx512_bf16,avx512,avx2                 # as on older CPUs

Prints JSON: tokens per second and peak memory of each contestant, and LightLM's speed over each other's. A step is
forward, backward, clipping and AdamW. Speeds are medians over rounds, with the slowest and the fastest round. nanoGPT
trains as its train.py does: with its own optimizer settings and its vocabulary of 50,304. If a contestant runs both
plain and compiled, ratios use the faster of the two. All contestants hold their memory at the same time: 5 to 8 GB each
for these shapes.

With --isa, the contest runs once per level of instructions, in processes that may not use better ones, and names those
that the CPU lacks. oneDNN obeys ONEDNN_MAX_CPU_ISA, torch's own kernels and torch.compile ATEN_CPU_CAPABILITY. MKL,
which multiplies in fp32, obeys MKL_ENABLE_INSTRUCTIONS on Intel's CPUs only; on AMD's it runs AVX2 at every level.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import report
from contest import Builder, Contestant, compete, contest_parser, lightlm, shape, summary

from lightlm.convert.huggingface.config import write_config
from lightlm.convert.huggingface.layouts import export_target
from lightlm.device import pick_dtype
from lightlm.optim.groups import build_optimizer


def transformers(options: argparse.Namespace, device: torch.device, suffix: str) -> Contestant:
    """Return the transformers class that the recipe exports to, with LightLM's optimizer."""
    import transformers

    recipe, config = shape(options)
    values = write_config(export_target(config).model_type, config.resolved())
    # Without dropout, as LightLM trains; scaled_dot_product_attention is transformers' default.
    their_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(their_config).to(device).train()
    model.config.use_cache = False
    optimizer = build_optimizer(model, recipe.optimizer, pick_dtype(options.dtype, device))
    if suffix == "compiled":
        model.compile()
    # transformers shifts labels itself; one more token gives the same number of predictions.
    return model, lambda tokens: model(tokens, labels=tokens).loss, optimizer


def nanogpt(options: argparse.Namespace, device: torch.device, suffix: str) -> Contestant:
    """Return nanoGPT's model with its own optimizer settings."""
    if options.nanogpt is None:
        raise SystemExit("nanogpt needs its code: clone it and pass --nanogpt FOLDER")
    sys.path.insert(0, str(options.nanogpt))
    from model import GPT, GPTConfig

    recipe, config = shape(options)
    if (config.norm, config.mlp, config.position) != ("layernorm", "gelu", "learned"):
        raise SystemExit("nanoGPT has only GPT-2's architecture: use --recipe gpt2-124m")
    model = GPT(
        GPTConfig(
            block_size=options.length,
            vocab_size=50_304,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.hidden_size,
            dropout=0.0,
            bias=config.bias,
        )
    ).to(device)
    section = recipe.optimizer
    optimizer = model.configure_optimizers(section.weight_decay, section.lr, section.betas, device.type)
    run = torch.compile(model) if suffix == "compiled" else model
    return model, lambda tokens: run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1], optimizer


@dataclass(frozen=True)
class Level:
    """A level of instructions: what torch calls the CPU's feature, and the values that hold the libraries to it."""

    feature: str
    onednn: str
    aten: str
    mkl: str

    def environment(self) -> dict[str, str]:
        return {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.aten,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
        }


LEVELS = {
    "amx": Level("amx_bf16", "DEFAULT", "avx512", "AVX512"),
    "avx512_bf16": Level("avx512_bf16", "AVX512_CORE_BF16", "avx512", "AVX512"),
    "avx512": Level("avx512_f", "AVX512_CORE", "avx512", "AVX512"),
    "avx2": Level("avx2", "AVX2", "avx2", "AVX2"),
}


def compare_levels(names: list[str], arguments: list[str]) -> dict[str, Any]:
    """Run this benchmark at each level that the CPU has; return the results, and the levels that it lacks."""
    has = torch.cpu.get_capabilities()
    levels: dict[str, Any] = {}
    for name in names:
        level = LEVELS[name]
        if not has.get(level.feature):
            levels[name] = f"not measured: this CPU lacks {level.feature}"
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [sys.executable, __file__, *arguments, "--out", str(out)]
            subprocess.run(command, env=os.environ | level.environment(), stdout=subprocess.DEVNULL, check=True)
            levels[name] = {"environment": level.environment(), **json.loads(out.read_text(encoding="utf-8"))}
    features = sorted({level.feature for level in LEVELS.values() if has.get(level.feature)})
    return {"cpu": has.get("cpu_name"), "features": features, "levels": levels}


CONTESTANTS: dict[str, Builder] = {"lightlm": lightlm, "transformers": transformers, "nanogpt": nanogpt}


def _without(arguments: list[str], *options: str) -> list[str]:
    """Return the arguments without these options and their values."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in options:
            next(rest, None)
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept


def main() -> None:
    parser = contest_parser(__doc__, recipe="demo", contestants="lightlm,transformers")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--isa", help=f"levels of instructions to compare, of {','.join(LEVELS)}")
    options = parser.parse_args()
    if options.isa is not None:
        names = options.isa.split(",")
        if unknown := sorted(set(names) - set(LEVELS)):
            parser.error(f"--isa: unknown level {', '.join(unknown)}; choose from {', '.join(LEVELS)}")
        report(compare_levels(names, _without(sys.argv[1:], "--isa", "--out")), options.out)
        return
    seconds, peaks = compete(options, CONTESTANTS)
    report(summary(options, seconds, peaks), options.out)


if __name__ == "__main__":
    main()
