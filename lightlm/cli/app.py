"""The `lightlm` command: its subcommands, and how errors reach the user.

Nothing heavy is imported here or at the top of a command's file, so that `lightlm --help` answers at once.
"""

import io
import sys
from typing import Annotated

import typer
from rich.markup import escape

from lightlm import __version__
from lightlm.cli.console import console
from lightlm.cli.convert import convert
from lightlm.cli.evaluate import evaluate
from lightlm.cli.generate import generate
from lightlm.cli.prepare_data import prepare_data
from lightlm.cli.recipes import recipes
from lightlm.cli.train import NEWEST, train
from lightlm.errors import LightLMError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
app.command("train")(train)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("convert")(convert)
app.add_typer(recipes, name="recipes")


def with_resume_value(arguments: list[str]) -> list[str]:
    """Give a bare `--resume` its value, the newest run: typer knows no options whose value may be left out."""
    filled: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        filled.append(argument)
        if argument == "--resume" and (following.startswith("-") or "=" in following):
            filled.append(NEWEST)
    return filled


def main() -> None:
    """Run the command line; a LightLMError becomes one message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A model may write what a Windows code page cannot: show a mark instead of failing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(with_resume_value(sys.argv[1:]))
    except LightLMError as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        sys.exit(130)
