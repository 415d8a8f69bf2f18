"""`lightlm generate`: continue a text with a model."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, print_json
from lightlm.errors import UsageError

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.generate.engine import Completion
    from lightlm.generate.sampling import Sampling

_SEPARATOR = "\n---\n"


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; an empty one starts from end-of-text.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Run, checkpoint, model in another format, or Hub id. [dim]Default: the newest run[/]",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Number of continuations of the prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per continuation.")] = 200,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; 0 takes the most likely token. [dim]Default: 0.8[/]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k most likely tokens. [dim]Default: all tokens[/]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the fewest tokens with this total probability. [dim]Default: 0.95[/]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same text.")] = 1337,
    dtype: Annotated[str, typer.Option(help="Precision: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print samples, token ids and finish reasons as one JSON document.")
    ] = False,
) -> None:
    """Continue a text with a model. The text streams to the terminal."""
    from lightlm.convert.load import load_pretrained
    from lightlm.device import pick_device, pick_dtype
    from lightlm.generate.engine import check
    from lightlm.generate.sampling import DEFAULT, Sampling

    if num_samples < 1:
        raise UsageError(f"num-samples must be at least 1, is {num_samples}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that are not UTF-8 as lone surrogates
        raise UsageError(
            f"the prompt is not valid UTF-8 at character {error.start + 1}; type it again, or set a UTF-8 locale"
        ) from None
    sampling = Sampling(
        DEFAULT.temperature if temperature is None else temperature, top_k, DEFAULT.top_p if top_p is None else top_p
    )
    target = pick_device(device)
    if dtype == "auto" and target.type == "cpu":
        # One token at a time, bf16 is slower even with AVX512-BF16: 10 tokens/s against 26 (SmolLM2-135M, 2 threads).
        dtype = "float32"
    loaded = load_pretrained(checkpoint, target, pick_dtype(dtype, target))
    ids = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.end_of_text_id]
    check([ids], max_new_tokens, loaded.model.config.max_seq_len)
    if not as_json:
        _write(prompt)
    started = time.perf_counter()
    samples = _samples(loaded, ids, num_samples, max_new_tokens, sampling, seed, stream=not as_json)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(_document(loaded, prompt, seed, sampling, samples))
    else:
        _write("\n")
        for sample in samples[1:]:
            _write(f"{_SEPARATOR}{prompt}{loaded.tokenizer.decode(sample.ids)}\n")
    _report(loaded, samples, seconds)


def _samples(
    loaded: "LoadedModel",
    ids: list[int],
    num_samples: int,
    max_new_tokens: int,
    sampling: "Sampling",
    seed: int,
    *,
    stream: bool,
) -> "list[Completion]":
    """Draw all samples at once. With `stream`, write the first as it comes: a terminal shows one text at a time."""
    from lightlm.generate import engine

    text = engine.TextStream(loaded.tokenizer)

    def on_token(row: int, token: int) -> None:
        if stream and row == 0:
            _write(text.push(token))

    end = {loaded.tokenizer.end_of_text_id}
    samples = engine.generate(loaded.model, [ids], max_new_tokens, sampling, seed, end, on_token, num_samples)
    _write(text.flush())
    return samples


def _document(
    loaded: "LoadedModel", prompt: str, seed: int, sampling: "Sampling", samples: "list[Completion]"
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": loaded.name,
        "path": str(loaded.path),
        "prompt": prompt,
        "seed": seed,
        "sampling": asdict(sampling),
        "samples": [
            {"text": loaded.tokenizer.decode(sample.ids), "ids": sample.ids, "finish_reason": sample.finish_reason}
            for sample in samples
        ],
    }


def _report(loaded: "LoadedModel", samples: "list[Completion]", seconds: float) -> None:
    for number, sample in enumerate(samples, 1):
        if sample.finish_reason == "context":
            context = loaded.model.config.max_seq_len
            console.print(f"Sample {number} ended early: the model's context of {context:,} tokens is full.")
    tokens = sum(len(sample.ids) for sample in samples)
    console.print(f"[dim]{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s[/]")


def _write(text: str) -> None:
    """Write model text unchanged: rich would read [brackets] in it as markup."""
    sys.stdout.write(text)
    sys.stdout.flush()
