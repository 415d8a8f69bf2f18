"""Check LightLM on a GPU in at most 8 minutes, and write what was found.

    python benchmarks/gpu_check.py                          or: make gpu-check
    python benchmarks/gpu_check.py --device cpu --tiny      the script itself, on a machine without a GPU

It runs the tests marked `cuda`, compares the losses of compiled, eager and CPU training, and measures the training of
three recipes, DDP in one process, and generation. Each section is a process with a time limit of its own, so that one
that fails or hangs costs only itself. Data are random tokens: nothing is downloaded. The result is a JSON file and a
Markdown table in benchmarks/results/, named after the GPU. Exit code 1 if a section failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import make_parser, write_json

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 480
SPEED_RECIPES = ("gpt2-124m", "lightlm", "moe")
# Shapes of --tiny; each recipe keeps the rest of itself.
TINY = ["model.num_layers=2", "model.hidden_size=64", "model.num_heads=2", "model.max_seq_len=64"]
TINY += ["model.vocab_size=512", "train.batch_tokens=256", "train.tokens=1M", "train.compile=false"]
TINY_MORE = {
    "gpt2-124m": ["model.intermediate_size=128", "schedule.warmup=2%"],
    "lightlm": ["model.num_kv_heads=1", "model.intermediate_size=128"],
    "moe": ["model.num_kv_heads=1", "model.intermediate_size=128", "model.moe_intermediate_size=32"],
    "demo": ["model.num_kv_heads=1", "model.intermediate_size=128"],
}
# Losses of the same steps in another precision or order of sums, relative to fp32 on the CPU.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}

Section = Callable[[argparse.Namespace], dict[str, Any]]


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-30:]))
    return {"outcome": lines[-1] if lines else "no output"}


def parity(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the losses of five steps of the demo on the CPU, eager and compiled on the device."""
    steps = {("cpu", "float32", False): losses(options, "cpu", "float32", compiled=False)}
    for dtype in ("float32", "bfloat16", "float16"):
        for compiled in (False, True) if not options.tiny else (False,):
            steps[options.device, dtype, compiled] = losses(options, options.device, dtype, compiled=compiled)
    expected = next(iter(steps.values()))
    rows, failed = [], []
    for (device, dtype, compiled), found in steps.items():
        furthest = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
        name = f"{device} {dtype}{' compiled' if compiled else ''}"
        rows.append({"run": name, "losses": [round(loss, 5) for loss in found], "furthest": furthest})
        if not furthest <= TOLERANCE[dtype]:
            failed.append(f"{name} differs by {furthest:.2g}")
    if failed:
        raise RuntimeError(f"losses differ from fp32 on the CPU: {'; '.join(failed)}; {json.dumps(rows)}")
    return {"runs": rows}


def losses(options: argparse.Namespace, device: str, dtype: str, *, compiled: bool) -> list[float]:
    """Return the losses of five steps on random tokens."""
    from lightlm.train.setup import set_up

    changes = [f"train.device={device}", f"train.dtype={dtype}", f"train.compile={str(compiled).lower()}"]
    setup = set_up(load(options, "demo", [*changes, "model.vocab_size=512", "train.batch_tokens=2K"]), None, print)
    found = []
    for step in range(5):
        count = setup.recipe.batch_sequences
        outcome = setup.gradients(step * count, count, threading.Event())
        assert outcome is not None
        setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)
        found.append(outcome.loss)
    return found


def load(options: argparse.Namespace, name: str, changes: list[str]) -> Any:
    """Return a shipped recipe, small with --tiny, with GPT-2's vocabulary unless it has one."""
    from lightlm.recipe import load_recipe

    small = [*TINY, *TINY_MORE[name]] if options.tiny else []
    changes = [*small, *(change for change in changes if not options.tiny or "batch_tokens" not in change)]
    if not load_recipe(name, changes).model.vocab_size:
        changes.append("model.vocab_size=50257")
    return load_recipe(name, changes)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure training steps of one recipe as `lightlm plan` does, in its own precision and compiled."""
    import torch

    from lightlm.device import peak_flops, pick_device, training_dtype
    from lightlm.model.transformer import Transformer
    from lightlm.train.planning.probe import run_probe

    recipe = load(options, options.recipe, [f"train.device={options.device}"])
    probe = run_probe(recipe)
    with torch.device("meta"):
        flops = Transformer(recipe.model).flops_per_token(recipe.seq_len)
    passes = recipe.batch_sequences / probe.micro_batch
    seconds = passes * probe.pass_seconds + probe.update_seconds
    rate = recipe.batch_sequences * recipe.seq_len / seconds
    device = pick_device(options.device)
    peak = peak_flops(device)
    return {
        "recipe": options.recipe,
        "dtype": str(training_dtype(recipe.train.dtype, device)).removeprefix("torch."),
        "micro_batch": probe.micro_batch,
        "tokens_per_second": round(rate),
        "mfu": round(flops * rate / peak, 4) if peak else None,
        "step_seconds": seconds,
        "memory": probe.memory,
    }


def ddp(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the gradient of DistributedDataParallel in a group of one process with the plain one."""
    import torch
    import torch.distributed as dist

    from lightlm.device import autocast
    from lightlm.train.setup import set_up
    from lightlm.train.step.parallel import MicroBatch, _replicate

    dist.init_process_group(
        "nccl" if options.device.startswith("cuda") else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    setup = set_up(load(options, "demo", [f"train.device={options.device}", "train.compile=false"]), None, print)
    samples = setup.loader.batch(0, min(8, setup.recipe.batch_sequences))
    inputs, targets = (part.to(setup.device) for part in samples)
    batch = MicroBatch(inputs, targets)
    norms = []
    for module in (setup.loss, _replicate(setup.loss._local, setup.device, compiled=False)):
        with autocast(setup.device, setup.dtype):
            objective = module(batch).objective
        (objective / batch.inputs_BT.numel()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(setup.model.parameters(), float("inf"))))
        setup.model.zero_grad()
    dist.destroy_process_group()
    if abs(norms[0] - norms[1]) > 1e-4 * norms[0]:
        raise RuntimeError(f"the gradient's norm is {norms[0]:.6g}, with DDP {norms[1]:.6g}")
    return {"gradient_norms": norms}


def generation(options: argparse.Namespace) -> dict[str, Any]:
    """Measure decoding with GPT-2's shape and random weights: new tokens per second."""
    import torch

    from lightlm.device import pick_device, pick_dtype
    from lightlm.generate.engine import generate
    from lightlm.generate.sampling import DEFAULT
    from lightlm.model.transformer import Transformer

    device = pick_device(options.device)
    dtype, count = pick_dtype("auto", device), 16 if options.tiny else 128
    torch.manual_seed(0)
    model = Transformer(load(options, "gpt2-124m", []).model).to(device, dtype).eval()
    rates = {}
    for rows in (1, 8):
        prompts = [[row + 1] * 16 for row in range(rows)]
        for _ in range(2):  # the second time counts
            started = time.perf_counter()
            made = generate(model, prompts, count, DEFAULT)
            seconds = time.perf_counter() - started
        rates[f"tokens_per_second_{rows}"] = round(sum(len(one.ids) for one in made) / seconds, 1)
    return {"dtype": str(dtype).removeprefix("torch.")} | rates


# Sections with their time limits in seconds; together they stay below TOTAL_SECONDS.
SECTIONS: dict[str, tuple[Section, int]] = {
    "tests": (tests, 90),
    "parity": (parity, 100),
    **{f"speed {name}": (speed, 70) for name in SPEED_RECIPES},
    "ddp": (ddp, 30),
    "generation": (generation, 40),
}


def run_section(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run a section in a process and return its result, or its error."""
    command = [sys.executable, __file__, "--device", options.device, "--section", name, *["--tiny"] * options.tiny]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
        last = (out.strip().splitlines() or [""])[-1]
        outcome = json.loads(last) if process.returncode == 0 else {"error": err.strip()[-2000:]}
    except subprocess.TimeoutExpired:
        end_group(process)
        outcome = {"error": f"took longer than its limit of {limit:.0f} s"}
    except ValueError:
        outcome = {"error": f"printed no result: {out[-500:]}"}
    return outcome | {"seconds": round(time.monotonic() - started, 1)}


def end_group(process: subprocess.Popen[str]) -> None:
    """End a section and the processes that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, 9)
    else:
        process.kill()
    process.wait()


def written(value: Any) -> str:
    """Return a value for the page."""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"# GPU check: {result['device']}", "", f"{versions}. {result['seconds']:.0f} s in total.", ""]
    lines += ["| section | result | seconds |", "| --- | --- | ---: |"]
    for name, outcome in result["sections"].items():
        shown = {key: value for key, value in outcome.items() if key not in ("seconds", "runs")}
        words = ", ".join(f"{key} {written(value)}" for key, value in shown.items())
        words += "; ".join(f"{run['run']}: {run['furthest']:.1e}" for run in outcome.get("runs", []))
        text = "FAILED: " + (outcome["error"].splitlines() or ["no message"])[-1] if "error" in outcome else words
        lines.append(f"| {name} | {text.replace('|', '/')} | {outcome['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--dry-run", action="store_true", help="list the sections and their limits")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        options.recipe = options.section.removeprefix("speed ")
        print(json.dumps(SECTIONS[options.section][0](options), default=float))
        return
    if options.dry_run:
        for name, (section, limit) in SECTIONS.items():
            print(f"{name}: {limit} s: {(section.__doc__ or '').splitlines()[0]}")
        return
    sys.path.insert(0, str(ROOT))
    from measure import machine_facts

    from lightlm.device import pick_device
    from lightlm.errors import UsageError

    try:
        facts = machine_facts(pick_device(options.device))
    except UsageError as error:
        sys.exit(f"{error}; `--device cpu --tiny` tries the script without a GPU")
    started = time.monotonic()
    result: dict[str, Any] = {**facts, "tiny": options.tiny, "sections": {}}
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    file = options.out / f"gpu-check-{slug}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or SECTIONS:
        left = TOTAL_SECONDS - (time.monotonic() - started)
        print(f"{name} ...", end=" ", flush=True)
        if left < 5:
            outcome = {"error": "no time is left", "seconds": 0.0}
        else:
            outcome = run_section(name, options, min(SECTIONS[name][1], left))
        print("failed" if "error" in outcome else "done", f"in {outcome['seconds']} s", flush=True)
        result["sections"][name] = outcome
        result["seconds"] = round(time.monotonic() - started, 1)
        write_json(result, file)  # after each section, so that a reboot keeps the others
        file.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result), f"\nWritten to {file} and {file.with_suffix('.md').name}", sep="")
    sys.exit(any("error" in outcome for outcome in result["sections"].values()))


if __name__ == "__main__":
    main()
