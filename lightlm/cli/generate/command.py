"""`lightlm generate`: continue texts and answer messages with a model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lightlm.cli.console import console, print_json, write_utf8
from lightlm.cli.generate.input import NO_CONVERSATION, checked, read_prompt, stop_text
from lightlm.cli.generate.model import (
    MODEL_HELP,
    DeviceOption,
    DtypeOption,
    ModelChoice,
    QuantizeOption,
    WeightsOption,
)
from lightlm.cli.generate.options import (
    DraftOption,
    FrequencyPenaltyOption,
    GuessesOption,
    LogitBiasOption,
    LookupOption,
    MinNewTokensOption,
    MinPOption,
    MTPOption,
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
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.settings import suggestions

_BATCH_SIZE, _GUESSES = 16, 4  # defaults
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
    from lightlm.convert.load import is_hub_id, locate
    from lightlm.generate.settings import Settings

    choice = ModelChoice(checkpoint, weights, dtype, quantize, device)
    _check_mode(prompt, prompt_file, interactive=interactive, jsonl=jsonl, out=out)
    if batch_size is not None and jsonl is None:
        raise UsageError("--batch-size is for the lines of a file; add --jsonl IN --out OUT")
    if guesses is not None and not lookup and draft is None:
        raise UsageError("--guesses says how many tokens --lookup or --draft guess; add one of them")
    if truncate not in (None, "left"):
        raise UsageError(f"--truncate {truncate}: write left, which drops the beginning of a prompt past the context")
    if system is not None:
        system = checked(system, "--system")
        if not chat and jsonl is None:
            raise UsageError(NO_CONVERSATION)
    if interactive and (num_samples > 1 or as_json):
        raise UsageError("--interactive shows one answer at a time; leave out --num-samples and --json")
    if logprobs is not None and not (as_json and jsonl is None):
        raise UsageError("--logprobs needs --json, which prints them, and one prompt")
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
    alone = num_samples == 1 and jsonl is None
    _check_speed(sampling, beams, length_penalty, lookup=lookup, draft=draft, mtp=mtp, alone=alone)
    if beams is not None and (interactive or jsonl or logprobs is not None or sliding_window or num_samples > beams):
        raise UsageError(
            "--beams searches the continuations of one prompt, at least as many as --num-samples; leave out "
            "--interactive, --jsonl, --logprobs and --sliding-window"
        )
    ends = tuple(stop_text(checked(text, "--stop")) for text in stop or ())
    settings = Settings(sampling, max_new_tokens, seed, ends, sliding_window)
    text = None if interactive or jsonl else read_prompt(prompt, prompt_file)
    rows = None
    if jsonl is not None:
        from lightlm.cli.generate.rows import read_rows

        rows = read_rows(jsonl, settings, chat=chat, system=system)
    choice.check_files()
    if draft is not None and not is_hub_id(draft):
        locate(draft)
    # All that needs no torch is checked by now: importing it takes a second or two.
    from lightlm.generate.prompts import PromptReader

    loaded = choice.load(_note)
    sampling.check_ids(loaded.tokenizer.vocab_size)
    speculation = None
    if lookup or mtp or draft is not None:
        from lightlm.generate.own_draft import own_draft_of
        from lightlm.generate.pace import Pace, round_costs
        from lightlm.generate.speculation import Guesser, Lookup, Speculation, draft_of

        guesser: Guesser = own_draft_of(loaded) if mtp else Lookup()
        if draft is not None:
            guesser = draft_of(choice.load_another(draft), loaded)
        count = 1 if mtp else guesses or _GUESSES
        speculation = Speculation(guesser, count, Pace(round_costs(loaded.model, guesser, count)))
    context = loaded.model.config.max_seq_len
    reader = PromptReader(loaded.tokenizer, context, parse_special, truncate is not None, _noted_once())
    write_utf8()
    suggested = suggestions(loaded.tokenizer.generation_config)
    if suggested and sampling == DEFAULT:
        _note(f"the model's files suggest {_listed(suggested)}; without such options LightLM uses its own defaults")
    if rows is not None:
        from lightlm.cli.generate.jsonl import answer_rows, describe

        assert jsonl is not None
        assert out is not None
        most = batch_size or _BATCH_SIZE
        facts = answer_rows(loaded, reader, rows, out, source=jsonl, num_samples=num_samples, batch_size=most)
        console.print(describe(facts), style="dim", markup=False, soft_wrap=True)
        if as_json:
            print_json({"model": loaded.name, "path": str(loaded.path), **facts})
    elif interactive:
        from lightlm.cli.generate.interactive import Session

        Session(loaded, reader, settings, chat, system, speculation).run()
    else:
        from lightlm.cli.generate.single import Beams, Single

        assert text is not None
        messages = _messages(text, system) if chat else None
        ids = reader.read_chat(messages, max_new_tokens) if messages else reader.read(text, max_new_tokens)
        search = None if beams is None else Beams(beams, 1.0 if length_penalty is None else length_penalty)
        single = Single(loaded, text, ids, settings, messages, suggested, speculation=speculation, beams=search)
        single.run(num_samples, as_json=as_json, logprobs=logprobs or 0)


def _check_mode(
    prompt: str | None, prompt_file: Path | None, *, interactive: bool, jsonl: Path | None, out: Path | None
) -> None:
    """Raise UsageError unless the command line names one source of prompts."""
    given = {
        "a prompt": prompt is not None,
        "--prompt-file": prompt_file is not None,
        "--interactive": interactive,
        "--jsonl": jsonl is not None,
    }
    named = [name for name, there in given.items() if there]
    if not named:
        raise UsageError(
            'there is no prompt: write one (lightlm generate "Once"), `-` for standard input, --prompt-file FILE, '
            "--interactive, or --jsonl IN --out OUT"
        )
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other; name one of them")
    if (jsonl is None) != (out is None):
        raise UsageError(
            "--jsonl IN and --out OUT go together: prompts and answers. The text of one prompt goes to a file with "
            '> FILE: lightlm generate "Once" > samples.txt'
        )
    if out is not None and jsonl is not None and out.exists() and jsonl.exists() and out.samefile(jsonl):
        raise UsageError(f"--out {out} is the file of prompts; name another file for the answers")
    if out is not None and (not out.parent.is_dir() or (out.exists() and not out.is_file())):
        problem = "is not a file" if out.exists() else f"cannot be written: there is no folder {out.parent}"
        raise UsageError(f"--out {out} {problem}; name a file in a folder that exists")


def _check_speed(
    sampling: Sampling,
    beams: int | None,
    length_penalty: float | None,
    *,
    lookup: bool,
    draft: str | None,
    mtp: bool,
    alone: bool,
) -> None:
    """Raise UsageError for options of beam search and of speculation that exclude others."""
    if length_penalty is not None and beams is None:
        raise UsageError("--length-penalty compares beams; add --beams N")
    if beams is not None and sampling.filters != DEFAULT.filters:
        raise UsageError("--beams draws nothing; leave out --temperature, --top-k, --top-p, --min-p and --typical-p")
    if lookup + mtp + (draft is not None) > 1:
        raise UsageError("--lookup, --draft and --mtp all guess the next tokens; choose one of them")
    if (lookup or mtp or draft is not None) and (beams is not None or not alone):
        raise UsageError(
            "--lookup, --draft and --mtp make one text faster; leave them out with --num-samples, --jsonl and --beams"
        )


def _messages(text: str, system: str | None) -> list[dict[str, Any]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


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
