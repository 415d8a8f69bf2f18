"""`lightlm convert`: checkpoints to Hugging Face folders and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json
from lightlm.errors import ConvertError, UsageError

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel

FORMATS = ("hf", "lightlm")


def convert(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Run, checkpoint folder, Hugging Face folder or Hub id. [dim]Default: the newest run[/]",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="hf (a folder that transformers loads) or lightlm (a checkpoint). "
            "[dim]Default: hf for a checkpoint, lightlm for a Hugging Face folder[/]",
            show_default=False,
        ),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder to write. [dim]Default: runs/RUN/hf for a run, else MODEL-hf or MODEL-lightlm beside it[/]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits and tokens with transformers after writing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Convert a checkpoint to a Hugging Face folder, or a Hugging Face model to a checkpoint.

    Without --out, an earlier export is replaced as long as nothing in it was changed since; any other folder needs
    --overwrite.
    """
    from lightlm import checkpoint
    from lightlm.convert.huggingface.export_target import export_target
    from lightlm.convert.huggingface.folder import export_huggingface, is_untouched_export
    from lightlm.convert.huggingface.verify import require_transformers
    from lightlm.convert.load import load_pretrained, locate
    from lightlm.device import DTYPES

    if to is not None and to not in FORMATS:
        raise UsageError(f"--to {to}: unknown format; this version converts to {' and '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: unknown precision; use {', '.join(DTYPES)}")
    if verify:
        require_transformers()  # before any work
    source = locate(model)
    from_format = "lightlm" if checkpoint.is_checkpoint(source) else "hf"
    to_format = next(name for name in FORMATS if name != from_format)
    if to == from_format:
        raise UsageError(f"--to {to}: {source} is in that format already; --to {to_format} converts it")
    target = out_folder or _default_folder(model, source, to_format)
    _check_target(target, source, replace=overwrite or (out_folder is None and is_untouched_export(target)))
    console.print(f"Converting {source} to {target}", style="dim", markup=False, soft_wrap=True)
    loaded = load_pretrained(source)
    parameters = loaded.model.num_parameters()["total"]
    if to_format == "hf":
        parameters = export_huggingface(loaded, target, dtype=DTYPES[dtype], overwrite=True)
    else:
        checkpoint.save_model(target, loaded.model.to(DTYPES[dtype]), loaded.tokenizer, overwrite=True)
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    summary = {
        "source": str(source),
        "folder": str(target),
        "format": to_format,
        "class": export_target(loaded.model.config).architecture if to_format == "hf" else "LightLM checkpoint",
        "parameters": parameters,
        "dtype": dtype,
        "files": sizes,
        "bytes": sum(sizes.values()),
    }
    if verify:
        summary["max_logit_difference"] = _verify(loaded, source, target, to_format, dtype)
    _report(summary, as_json=as_json)


def _default_folder(model: str | None, source: Path, to: str) -> Path:
    """`runs/RUN/hf` for a run, with the step in its name for a checkpoint named itself; else beside the model."""
    from lightlm.convert.load import is_hub_id
    from lightlm.runs import run_of

    if model is not None and is_hub_id(model):
        return Path(f"{Path(model).name}-{to}")
    run = run_of(source)
    if run is None:
        folder = source.resolve().with_name(f"{source.resolve().name}-{to}")
    else:
        named_itself = model is not None and Path(model).resolve() == source.resolve()
        folder = run / (f"{to}-{source.name}" if named_itself else to)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _check_target(target: Path, source: Path, *, replace: bool) -> None:
    """Refuse to write where something would be lost."""
    if source.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target} is or holds the model to convert; choose another folder with --out")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "config.json").is_file():
        raise UsageError(f"{target} exists and is no model folder, so it is not replaced; choose another with --out")
    if not replace:
        raise UsageError(f"{target} exists already; choose another folder with --out, or replace it with --overwrite")


def _verify(loaded: "LoadedModel", source: Path, target: Path, to: str, dtype: str) -> float:
    """The largest difference between our logits and transformers'; an error if it is more than rounding."""
    from lightlm.checkpoint import load_model
    from lightlm.convert.huggingface.verify import TOLERANCE, check_tokenizer, largest_difference
    from lightlm.device import DTYPES

    if to == "hf":
        check_tokenizer(loaded, target)
        difference = largest_difference(loaded, target, DTYPES[dtype])
    else:
        difference = largest_difference(load_model(target), source, DTYPES[dtype])
    if not difference <= TOLERANCE:
        raise ConvertError(
            f"{target} does not compute what {source} does: logits differ from transformers' by up to "
            f"{difference:.2e}, more than rounding ({TOLERANCE:.0e}); do not use it, and report this"
        )
    return difference


def _report(summary: dict[str, Any], *, as_json: bool) -> None:
    folder = Path(summary["folder"]).as_posix()
    loader = "AutoModelForCausalLM.from_pretrained" if summary["format"] == "hf" else "load_pretrained"
    module = "transformers" if summary["format"] == "hf" else "lightlm.convert.load"
    summary["python"] = f'from {module} import {loader.split(".")[0]}; model = {loader}("{folder}")'
    if as_json:
        print_json(summary)
        return
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("class", summary["class"])
    table.add_row("parameters", f"{summary['parameters']:,}")
    table.add_row("dtype", summary["dtype"])
    if "max_logit_difference" in summary:
        table.add_row("verified", f"logits differ from transformers' by {summary['max_logit_difference']:.1e} at most")
    for name, size in summary["files"].items():
        table.add_row(name, f"{size:,} bytes")
    table.add_row("together", f"{summary['bytes']:,} bytes")
    out.print(table)
    out.print(f"Written to {folder}", markup=False, soft_wrap=True)
    out.print(summary["python"], markup=False, soft_wrap=True)
