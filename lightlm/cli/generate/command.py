"""`lightlm generate`: continue a text with a model."""

import re
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lightlm.cli.console import console, print_json
from lightlm.cli.generate.options import (
    FrequencyPenaltyOption,
    LogitBiasOption,
    MinNewTokensOption,
    MinPOption,
    NoRepeatNgramOption,
    PresencePenaltyOption,
    RepetitionPenaltyOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TypicalPOption,
    read_sampling,
)
from lightlm.errors import UsageError

if TYPE_CHECKING:
    from lightlm.data.tokenizer import Tokenizer
    from lightlm.generate.engine import Completion

WeightsOption = Annotated[  # also of `convert` and `eval`
    str | None,
    typer.Option(
        metavar="ema|raw",
        help="Average or last weights of a run with train.ema. [dim]Default: ema[/]",
        show_default=False,
    ),
]
_SENTENCE = re.compile(r"-[^=]*\s")  # begins with a dash, and has a blank where an option's name has none


class PromptCommand(TyperCommand):
    """A command whose prompt may begin with a dash, such as "- milk"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" not in args and (prompts := [text for text in args if _SENTENCE.match(text)]):
            args = [*(text for text in args if text not in prompts), "--", *prompts]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            unknown = getattr(error, "option_name", "--")  # click's NoSuchOption, or its copy in newer typer
            if unknown.startswith("--"):
                raise
            raise UsageError(
                f'there is no option {unknown}; write -- before a prompt that begins with a dash: generate -- "-5"'
            ) from None


def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="Text to continue; `-` reads it from standard input, an empty one starts a new text."
        ),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Run, checkpoint, model in another format, or Hub id. [dim]Default: the newest run[/]",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of continuations of the prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per continuation.")] = 200,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    typical_p: TypicalPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    presence_penalty: PresencePenaltyOption = None,
    no_repeat_ngram: NoRepeatNgramOption = None,
    logit_bias: LogitBiasOption = None,
    min_new_tokens: MinNewTokensOption = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=1, help="With --json: log-probabilities of each token and of the N most likely.", metavar="N"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same text.")] = 1337,
    weights: WeightsOption = None,
    dtype: Annotated[str, typer.Option(help="Precision: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Continue a text with a model. The text streams to the terminal."""
    from lightlm import choices
    from lightlm.convert.formats import require_average
    from lightlm.convert.load import is_hub_id, load_pretrained, locate

    choices.check_device(device)
    choices.check_dtype(dtype)
    choices.check_weights(weights)
    prompt = _checked(_standard_input() if prompt == "-" else prompt)
    sampling = read_sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        no_repeat_ngram=no_repeat_ngram,
        logit_bias=logit_bias,
        min_new_tokens=min_new_tokens,
    )
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json, which prints them")
    if checkpoint is None or not is_hub_id(checkpoint):
        path = locate(checkpoint)
        if weights is not None:
            require_average(path)
    # All that needs no torch is checked by now: importing it takes a second or two.
    from lightlm.cpu import FEW_SLICES, use_threads
    from lightlm.device import keep_freed_memory, pick_device, pick_dtype
    from lightlm.generate import engine
    from lightlm.generate.prompts import encode_prompt
    from lightlm.generate.text import TextStream, text_of

    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
        use_threads("auto", lambda message: console.print(f"Note: {message}", markup=False), slices=FEW_SLICES)
    if dtype == "auto" and target.type == "cpu":
        # One token at a time, bf16 is slower even with AVX512-BF16: 10 tokens/s against 26 (SmolLM2-135M, 2 threads).
        dtype = "float32"
    loaded = load_pretrained(checkpoint, target, pick_dtype(dtype, target), weights)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = encode_prompt(tokenizer, prompt)
    engine.check([ids], max_new_tokens, model.config.max_seq_len, sampling)
    sampling.check_ids(tokenizer.vocab_size)
    stream = TextStream(tokenizer, ids)

    def write(text: str) -> None:
        if not as_json:
            sys.stdout.write(text)  # unchanged: rich would read [brackets] in it as markup
            sys.stdout.flush()

    def on_token(row: int, token: int) -> None:
        if row == 0:  # a terminal shows one text at a time
            write(stream.push(token))

    write(prompt)
    started = time.perf_counter()
    samples = engine.generate(
        model,
        [ids],
        max_new_tokens,
        sampling,
        seed,
        tokenizer.end_ids,
        on_token,
        num_samples,
        tokenizer.vocab_size,
        logprobs or 0,
    )
    seconds = time.perf_counter() - started
    write(stream.flush() + "\n")
    texts = [text_of(tokenizer, ids, sample.ids) for sample in samples]
    for text in texts[1:]:
        write(f"\n---\n{prompt}{text}\n")
    if as_json:
        print_json(
            {
                "model": loaded.name,
                "path": str(loaded.path),
                "prompt": prompt,
                "seed": seed,
                "sampling": asdict(sampling),
                "samples": [
                    {"text": text, "ids": sample.ids, "finish_reason": sample.finish_reason}
                    | ({"logprobs": _log_probs(tokenizer, sample)} if logprobs else {})
                    for text, sample in zip(texts, samples, strict=True)
                ],
            }
        )
    for number, sample in enumerate(samples, 1):
        if sample.finish_reason == "context":
            context = model.config.max_seq_len
            console.print(f"Sample {number} ended early: the model's context of {context:,} tokens is full.")
    tokens = sum(len(sample.ids) for sample in samples)
    console.print(f"[dim]{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s[/]")


def _log_probs(tokenizer: "Tokenizer", sample: "Completion") -> list[dict[str, Any]]:
    """Return each token with its log-probability and the most likely tokens at its place, named as in OpenAI's API."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.special_tokens.get(token) or tokenizer.decode([token])
        return {"id": token, "token": text, "logprob": logprob}

    return [
        entry(token, found.chosen) | {"top_logprobs": [entry(*pair) for pair in found.top]}
        for token, found in zip(sample.ids, sample.log_probs, strict=True)
    ]


def _standard_input() -> str:
    """Return the text on standard input without its last line break, which a shell adds."""
    if sys.stdin.isatty():
        console.print("[dim]Type the prompt; Ctrl-D ends it (on Windows Ctrl-Z and Enter).[/]")
    text = sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n")
    return text.removesuffix("\n")


def _checked(prompt: str) -> str:
    """Return the prompt if it is UTF-8.

    Raises:
        UsageError: it is not. Python keeps such bytes as lone surrogates.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not valid UTF-8 at character {error.start + 1}; type it again, or set a UTF-8 locale"
        ) from None
    return prompt
