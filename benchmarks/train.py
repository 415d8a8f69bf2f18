"""Training speed of LightLM, transformers and nanoGPT: the same model, batch and precision, in turn, in one run.

    python benchmarks/train.py                                                   # the demo's shape
    python benchmarks/train.py --recipe lightlm --sequences 2 --length 1024 model.qk_norm=false
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/train.py --recipe gpt2-124m --sequences 4 --length 1024 --nanogpt nanoGPT \\
        --contestants "lightlm,transformers,nanogpt compiled"

Prints JSON: tokens per second and peak memory of each contestant, and LightLM's speed over each other's. A step is
forward, backward, clipping and AdamW. Speeds are medians over rounds, with the slowest and the fastest round. nanoGPT
trains as its train.py does: with its own optimizer settings and its vocabulary of 50,304. If a contestant runs both
plain and compiled, ratios use the faster of the two. All contestants hold their memory at the same time: 5 to 8 GB each
for these shapes.
"""

import argparse
import sys
from pathlib import Path

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


CONTESTANTS: dict[str, Builder] = {"lightlm": lightlm, "transformers": transformers, "nanogpt": nanogpt}


def main() -> None:
    parser = contest_parser(__doc__, recipe="demo", contestants="lightlm,transformers")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    options = parser.parse_args()
    seconds, peaks = compete(options, CONTESTANTS)
    report(summary(options, seconds, peaks), options.out)


if __name__ == "__main__":
    main()
