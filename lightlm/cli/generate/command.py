"""`lightlm generate`: continue texts and answer messages with a model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lightlm.cli.console import console, print_json, write_utf8
from lightlm.cli.generate.guessing import DraftOption, GuessesOption, Guessing, LookupOption, MTPOption
from lightlm.cli.generate.model import (
    MODEL_HELP,
    DeviceOption,
    DtypeOption,
    ModelChoice,
    QuantizeOption,
    WeightsOption,
)
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
from lightlm.cli.generate.request import Request
from lightlm.errors import UsageError
from lightlm.generate.sampling import DEFAULT
from lightlm.generate.settings import suggestions

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.cli.generate.rows import Row
    from lightlm.generate.prompts import PromptReader

_BATCH_SIZE = 16  # without --batch-size
_SENTENCE = re.compile(r"-[^=]*\s")  # begins with a dash, and has a blank where an option's name has none


class PromptCommand(TyperCommand):
    """A command whose prompt may begin with a dash, such as "- milk"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" not in args and (prompts := self._sentences(args)):
            args = [*(text for place, text in enumerate(args) if place not in prompts), "--", *prompts.values()]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            unknown = getattr(error, "option_name", "--")  # click's NoSuchOption, or its copy in newer typer
            if unknown.startswith("--"):
                raise
            raise UsageError(
                f'there is no option {unknown}; write -- before a prompt that begins with a dash: generate -- "-5"'
            ) from None

    def _sentences(self, args: list[str]) -> dict[int, str]:
        """Return the arguments that look like a prompt with a dash, by place, without values of options."""
        taking = {name for option in self.params if not getattr(option, "is_flag", True) for name in option.opts}
        before = ["", *args]
        return {place: text for place, text in enumerate(args) if _SENTENCE.match(text) and before[place] not in taking}


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text to continue; `-` reads it from standard input, an empty one starts a new text.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=MODEL_HELP,
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.", show_default=False)
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Type prompts one after the other; /help lists commands.")
    ] = False,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="IN",
            help='Answer each line of a file, such as {"prompt": "Once"}; `-` is standard input. Needs --out.',
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="The file of answers to --jsonl. The same command resumes an interrupted one.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of --jsonl lines answered at a time. [dim]Default: 16[/]",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message; the model's chat template is applied.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System message before a conversation (--chat).", show_default=False),
    ] = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens that a prompt spells as such, not as text.")
    ] = False,
    truncate: Annotated[
        str | None,
        typer.Option(
            metavar="left",
            help="Drop the beginning of a prompt past the context. [dim]Default: such a prompt is an error[/]",
            show_default=False,
        ),
    ] = None,
    sliding_window: Annotated[
        bool, typer.Option("--sliding-window", help="Go past a full context: drop its oldest half, read the rest anew.")
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text, which may spell special tokens; repeatable. \\n is a line break.",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of continuations of each prompt.")] = 1,
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
    beams: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Search the likeliest texts with N beams, in place of drawing.", show_default=False
        ),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            help="With --beams: above 0 favors long texts, below 0 short ones. [dim]Default: 1[/]", show_default=False
        ),
    ] = None,
    lookup: LookupOption = False,
    draft: DraftOption = None,
    mtp: MTPOption = False,
    guesses: GuessesOption = None,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same text.")] = 1337,
    weights: WeightsOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Continue a text with a model, or answer messages (--chat). The text streams to the terminal."""
    choice = ModelChoice(checkpoint, weights, dtype, quantize, device)
    request = Request(
        prompt=prompt,
        prompt_file=prompt_file,
        interactive=interactive,
        jsonl=jsonl,
        out=out,
        batch_size=batch_size,
        chat=chat,
        typed_system=system,
        truncate=truncate,
        sliding_window=sliding_window,
        stop=stop or [],
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        logprobs=logprobs,
        beams=beams,
        length_penalty=length_penalty,
        guessing=Guessing(lookup, draft, mtp, guesses),
        seed=seed,
        as_json=as_json,
    )
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
    settings = request.settings(sampling)
    text, rows = request.read_text(), request.read_rows(settings)
    choice.check_files()
    request.guessing.check_files()
    # All that needs no torch is checked by now: importing it takes a second or two.
    from lightlm.generate.prompts import PromptReader

    loaded = choice.load(_note)
    sampling.check_ids(loaded.tokenizer.vocab_size)
    speculation = request.guessing.load(choice, loaded)
    context = loaded.model.config.max_seq_len
    reader = PromptReader(loaded.tokenizer, context, parse_special, truncate is not None, _noted_once())
    write_utf8()
    suggested = suggestions(loaded.tokenizer.generation_config)
    if suggested and sampling == DEFAULT:
        _note(f"the model's files suggest {_listed(suggested)}; without such options LightLM uses its own defaults")
    if rows is not None:
        _answer_rows(loaded, reader, rows, request)
    elif text is not None:
        from lightlm.cli.generate.single import Beams, Single

        messages = request.messages(text)
        ids = reader.read_chat(messages, max_new_tokens) if messages else reader.read(text, max_new_tokens)
        search = None if beams is None else Beams(beams, 1.0 if length_penalty is None else length_penalty)
        single = Single(loaded, text, ids, settings, messages, suggested, speculation=speculation, beams=search)
        single.run(num_samples, as_json=as_json, logprobs=logprobs or 0)
    else:
        from lightlm.cli.generate.interactive import Session

        Session(loaded, reader, settings, chat, request.system, speculation).run()


def _answer_rows(loaded: "LoadedModel", reader: "PromptReader", rows: "list[Row]", request: Request) -> None:
    """Answer the lines of --jsonl into --out, and say how many."""
    from lightlm.cli.generate.jsonl import answer_rows, describe

    assert request.jsonl is not None
    assert request.out is not None
    facts = answer_rows(
        loaded,
        reader,
        rows,
        request.out,
        source=request.jsonl,
        num_samples=request.num_samples,
        batch_size=request.batch_size or _BATCH_SIZE,
    )
    console.print(describe(facts), style="dim", markup=False, soft_wrap=True)
    if request.as_json:
        print_json({"model": loaded.name, "path": str(loaded.path), **facts})


def _note(message: str) -> None:
    console.print(f"Note: {message}", markup=False, soft_wrap=True)


def _noted_once() -> Callable[[str], None]:
    """Return a function that prints each note the first time."""
    seen: set[str] = set()

    def note(message: str) -> None:
        if message not in seen:
            seen.add(message)
            _note(message)

    return note


def _listed(suggested: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in suggested.items())
