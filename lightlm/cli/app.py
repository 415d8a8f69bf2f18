"""The `lightlm` command: its subcommands, and how errors reach the user.

Nothing heavy is imported here or at the top of a command's file, so that `lightlm --help` answers at once.
"""

import sys
from itertools import zip_longest
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from lightlm import __version__, files
from lightlm.cli.console import console, guard_streams, lost_output
from lightlm.cli.convert import convert
from lightlm.cli.evaluate import evaluate
from lightlm.cli.generate.command import PromptCommand, generate
from lightlm.cli.plan import plan
from lightlm.cli.prepare_data.command import prepare_data
from lightlm.cli.recipes import recipes
from lightlm.cli.report import report
from lightlm.cli.runs import runs
from lightlm.cli.serve import serve
from lightlm.cli.sweep import sweep
from lightlm.cli.train import NEWEST, is_override, train
from lightlm.errors import LightLMError, is_out_of_memory
from lightlm.processes import bound_spinning

# What these print is in the files that they write, too: they succeed also where standard output cannot be written.
_RESULTS_ARE_FILES = (["train"], ["sweep"], ["prepare-data"])
# What to do where a device is out of memory, by command.
_NEED_LESS_MEMORY = {
    "train": "lower train.micro_batch_size, or set train.activation_checkpointing=true",
    "eval": "lower --batch-size",
    "serve": "lower --batch-size",
    "generate": "lower --num-samples or --max-new-tokens (with --jsonl, --batch-size), or take another --device",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Language models under 150M parameters, from text to a benchmarked, exported model.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lightlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("prepare-data")(prepare_data)
app.command("plan")(plan)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("eval")(evaluate)
app.command("generate", cls=PromptCommand)(generate)
app.command("serve")(serve)
app.command("convert")(convert)
app.command("report")(report)
app.add_typer(recipes, name="recipes")
app.add_typer(runs, name="runs")


def with_resume_value(arguments: list[str]) -> list[str]:
    """Give a bare `--resume` its value, the newest run: typer has no options with an optional value."""
    filled: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="-"):
        filled.append(argument)
        if argument == "--resume" and (following.startswith("-") or is_override(following)):
            filled.append(NEWEST)
    return filled


def _fail(message: str, exit_code: int) -> NoReturn:
    console.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(exit_code)


def main() -> None:
    """Run the command line; a LightLMError becomes one message and its exit code."""
    bound_spinning()
    guard_streams()
    try:
        _run(sys.argv[1:])
    except SystemExit as ended:
        if not ended.code and (lost := lost_output()) is not None:
            text = f"standard output could not be written: {lost.strerror}"
            if sys.argv[1:2] not in _RESULTS_ARE_FILES:
                _fail(text, 1)
            console.print(f"Note: {escape(text)}", soft_wrap=True)
        raise


def _run(arguments: list[str]) -> None:
    try:
        with files.writing():  # what a library writes; our own files name themselves
            app(with_resume_value(arguments))
    except LightLMError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # Permissions, a full disk, a file in place of a folder: the system's message names the path.
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = _NEED_LESS_MEMORY.get(arguments[0], "stop other programs that use it, or take a smaller model")
        _fail(f"the device is out of memory; {advice}. {error}", 1)
