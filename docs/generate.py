"""Write the generated pages of the site: the references of recipes, commands and formats.

`make docs` runs `python docs/generate.py` before each build, so these pages are always those of the code.
"""

import re
import sys
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from lightlm.cli.app import app
from lightlm.convert.formats import FORMATS
from lightlm.convert.huggingface.layouts import MISSING_PARTS
from lightlm.model.config import ModelConfig
from lightlm.recipe.reference import keys, sections

RECIPE_HEAD = """# Recipe reference

Every key that a recipe may have. This page is generated from the code; `lightlm recipes keys [SECTION]` prints the same
in a terminal, and `recipes/recipe.schema.json` brings it into editors ([how](../guides/recipes.md#in-an-editor)).

`tokens` are written as a number or with a suffix: `K`, `M`, `B` and `T` are powers of 1,000, but powers of 1,024 in
`train.batch_tokens` and `schedule.batch_start`. A share such as `2%` is a share of `train.tokens`.
"""

COMMANDS_HEAD = """# Command reference

Every command with its arguments and options. This page is generated from the code; `lightlm COMMAND --help` prints the
same. A value in brackets may be left out.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a training diverged, 130 interrupted. Processes that torchrun started
also end with 70 after a crash and with 75 when they lose the others, so that it starts them again. Results go to
standard output, progress and messages to standard error.
"""

FORMATS_HEAD = """# Formats of models

What `lightlm convert` reads and writes ([how](../guides/conversion.md)). This page is generated from the code.
`lightlm convert --list` prints the first table.
"""

_GPT2 = {"norm": "layernorm", "mlp": "gelu", "bias": True}
_MOE = {"num_experts": 4}
# Settings of `model`, as the rows of the table of architectures name them, and their values.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "`norm: layernorm`, `mlp: gelu`, `position: learned`, `bias`": {**_GPT2, "position": "learned"},
    "the defaults": {},
    "`bias`, `bias_in: all`, `attention` or `mlp`": {"bias": True},
    "`bias`, `bias_in: qkv`": {"bias": True, "bias_in": "qkv"},
    "`mlp: relu2`": {"mlp": "relu2"},
    "`norm: layernorm`, `mlp: gelu`, `bias`": _GPT2,
    "`qk_norm`": {"qk_norm": True},
    "`qk_norm`, `attention_gate`": {"qk_norm": True, "attention_gate": True},
    "`num_experts`, `router: sigmoid`; shared experts, `qk_norm` or not": _MOE,
    "`num_experts`, `router: softmax`": {**_MOE, "router": "softmax"},
    "`num_experts`, `router: softmax`, `qk_norm`": {**_MOE, "router": "softmax", "qk_norm": True},
    "`num_experts`, `router: softmax`, shared experts": {**_MOE, "router": "softmax", "num_shared_experts": 1},
    "`layer_sharing`": {"layer_sharing": 2},
    "`rope_scaling: linear`": {"rope_scaling": "linear", "rope_factor": 2.0},
    "`rope_scaling: llama3`": {"rope_scaling": "llama3", "rope_factor": 2.0},
    "`qk_norm`, `rope_scaling: llama3`": {"qk_norm": True, "rope_scaling": "llama3", "rope_factor": 2.0},
    "`sliding_window`": {"sliding_window": 8},
    "`multipliers`, `residual_scale`, `embedding_scale`, `base_depth`, `qk_gain`": {
        "multipliers": "both",
        "residual_scale": 0.5,
        "embedding_scale": 2.0,
        "base_depth": 4,
    },
}


def cell(text: str) -> str:
    """Return a text as the cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Return code for the cell of a Markdown table, where no backticks may hold a bar."""
    return f"<code>{escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def recipe_page() -> str:
    parts = [RECIPE_HEAD]
    for section, group in groupby(keys(), key=lambda entry: entry.key.partition(".")[0]):
        rows = [
            (
                code(entry.key),
                cell(entry.allowed),
                entry.default if entry.default == "required" else code(entry.default),
                cell(entry.description),
            )
            for entry in group
        ]
        parts += [f"## {section}\n", f"{sections()[section]}\n", table(("key", "allowed", "default", "meaning"), rows)]
    return "\n".join(parts)


def commands_page() -> str:
    parts = [COMMANDS_HEAD]
    for name, command in walk("lightlm", typer.main.get_command(app)):
        parts += [f"## {name}\n", f"{plain(command.help)}\n", f"    {usage(name, command)}\n"]
        if rows := [row(parameter) for parameter in parameters(command)]:
            parts.append(table(("argument or option", "default", "meaning"), rows))
    return "\n".join(parts)


def formats_page() -> str:
    """Return tables of what each format reads and writes, of architectures, and of what is refused."""
    known = list(FORMATS.values())
    rows = [
        (code(each.name), each.takes or "-", each.makes or "-", ", ".join(each.quantizations) or "-", needs(each))
        for each in known
    ]
    parts = [FORMATS_HEAD, table(("format", "reads", "writes", "`--quantize`", "needs"), rows)]
    written = [each for each in known if each.writes]
    base = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_seq_len": 64, "vocab_size": 97}
    configs = {name: ModelConfig(**base, **changes).resolved() for name, changes in ARCHITECTURES.items()}
    rows = [(name, *(each.target(config) or "-" for each in written)) for name, config in configs.items()]
    parts += ["## What models are called there\n", "Rows name settings of `model`; the others have their defaults.\n"]
    parts.append(table(("model", *(code(each.name) for each in written)), rows))
    rows = [
        (name, code(each.name), cell(each.refusal(config)))
        for name, config in configs.items()
        for each in written
        if each.refusal(config)
    ]
    parts += ["## What is refused\n", table(("model", "format", "why"), rows)]
    rows = [(code(each.name), ", ".join(each.kinds) or "every model of LightLM") for each in known if each.reads]
    parts += ["## What is read\n", table(("format", "models"), rows)]
    reasons: dict[str, list[str]] = {}
    for model_type, reason in MISSING_PARTS.items():
        reasons.setdefault(reason, []).append(code(model_type))
    missing = [(", ".join(names), reason) for reason, names in reasons.items()]
    parts += ["## Models on the Hub that LightLM does not have\n", table(("`model_type`", "because"), missing)]
    return "\n".join(parts)


def needs(known: Any) -> str:
    extra = f"`[{known.name}]`"
    return extra if known.package else f"{extra} for `--verify`" if known.verifier else "-"


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it, each with its full name."""
    yield name, command
    for inner, child in getattr(command, "commands", {}).items():
        yield from walk(f"{name} {inner}", child)


def plain(markup: str | None) -> str:
    """Return a help text without rich's markup, one line per paragraph."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", Text.from_markup(markup or "").plain.strip())
    return re.sub(r"\n\s*", "\n\n", text)


def parameters(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]


def usage(name: str, command: Any) -> str:
    arguments = [value_name(entry) for entry in parameters(command) if entry.param_type_name == "argument"]
    if getattr(command, "commands", None):
        arguments.append("COMMAND")
    return " ".join([name, *arguments, "[OPTIONS]"])


def value_name(parameter: Any) -> str:
    name = parameter.metavar or ("N" if type(parameter.default) is int else parameter.name.upper())
    if parameter.param_type_name != "argument":
        return name
    several = f"{name} ..." if parameter.nargs == -1 else name
    return several if parameter.required else f"[{several}]"


def row(parameter: Any) -> tuple[str, ...]:
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = value_name(parameter)
    elif not parameter.is_flag:
        names += f" {value_name(parameter)}"
    default = parameter.default
    shown = "" if default is None or isinstance(default, bool) else code(str(default))
    return code(names), shown, cell(plain(parameter.help))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.md").write_text(recipe_page(), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "formats.md").write_text(formats_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
