"""Compare the greedy text of LightLM and llama.cpp, which run the same float32 weights.

    python benchmarks/llamacpp.py runs/demo runs/moe-demo [--steps 64] [--out FILE]

Each model is exported to a GGUF file in a temporary folder. Both programs continue eight prompts; neither may take a
token that ends a text, nor another special token. Exit code 1 says that a text differs. It needs the extra `[gguf]`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import make_parser, write_json

from lightlm.checkpoint import LoadedModel
from lightlm.convert.gguf.file import export_gguf
from lightlm.convert.gguf.llamacpp import llama_cpp
from lightlm.convert.load import load_pretrained
from lightlm.generate.engine import generate
from lightlm.generate.sampling import Sampling

PROMPTS = (
    "Return a new",
    "The file object",
    "The capital of France is",
    "Once upon a time",
    "def main():\n    ",
    "In 1969, 3.14",
    "If an exception is raised",
    "Water boils at",
)


def compare(loaded: LoadedModel, steps: int) -> dict[str, Any]:
    """Return how many texts are equal, and of each other one where it differs and by what margin ours was chosen."""
    special = sorted({*loaded.tokenizer.special_tokens, *loaded.tokenizer.end_ids})
    greedy = Sampling(temperature=0.0, logit_bias=tuple((index, -100.0) for index in special))
    differing = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(loaded, path, "float32")
        with llama_cpp(path, positions=512) as theirs:
            for prompt in PROMPTS:
                ids = [*loaded.tokenizer.context_ids, *loaded.tokenizer.encode(prompt)]
                [ours] = generate(loaded.model, [ids], steps, greedy)
                found = theirs.continue_greedily(ids, steps, banned=special)
                if found != ours.ids:
                    equal = [ours == theirs for ours, theirs in zip(ours.ids, found, strict=False)]
                    step = [*equal, False].index(False)  # one may have ended early
                    differing.append({"prompt": prompt, "step": step, "margin": margin(loaded, ids + ours.ids[:step])})
    return {"prompts": len(PROMPTS), "steps": steps, "equal": len(PROMPTS) - len(differing), "differing": differing}


@torch.no_grad()
def margin(loaded: LoadedModel, ids: list[int]) -> float:
    """Return how much likelier the likeliest next token is than the second, in nats."""
    best = loaded.model(torch.tensor([ids]))[0, -1].topk(2).values
    return (best[0] - best[1]).item()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    for name in options.models:
        results[name] = compare(load_pretrained(name), options.steps)
        print(f"{name}: {results[name]}", flush=True)
    write_json(results, options.out)
    sys.exit(any(result["differing"] for result in results.values()))


if __name__ == "__main__":
    main()
