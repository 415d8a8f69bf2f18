"""`lightlm convert`: models between LightLM's checkpoints and other formats."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm import files
from lightlm.cli.console import console, out, print_json, print_table
from lightlm.cli.generate.model import WeightsOption
from lightlm.convert.formats import (
    FORMATS,
    convert_model,
    format_named,
    format_of,
    holds_weights,
    read_model,
    reader_of,
)
from lightlm.convert.protocol import Format
from lightlm.errors import UsageError, how_to_install
from lightlm.train.signals import interrupted_by_signals

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel

_QUANTIZATIONS = ", ".join(
    f"{', '.join(known.quantizations)} ({known.name})" for known in FORMATS.values() if known.quantizations
)
_READ = ", ".join(known.name for known in FORMATS.values() if known.reads)
_WRITTEN = ", ".join(known.name for known in FORMATS.values() if known.writes)


@interrupted_by_signals()
def convert(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Run, checkpoint folder, model in another format, or Hub id. [dim]Default: the newest run[/]",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help=f"Format to write: {_WRITTEN}. [dim]Default: hf for a checkpoint, lightlm for everything else[/]",
            show_default=False,
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FORMAT", help=f"Format of MODEL: {_READ}. [dim]Default: detected[/]", show_default=False
        ),
    ] = None,
    out_path: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="Folder or file to write. [dim]Default: runs/RUN/FORMAT for a run, else MODEL-FORMAT beside MODEL[/]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16 or float16.")] = "float32",
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help=f"Store matrices in fewer bits: {_QUANTIZATIONS}. It takes the place of --dtype.",
            show_default=False,
        ),
    ] = None,
    weights: WeightsOption = None,
    average: Annotated[
        int, typer.Option(metavar="N", min=1, help="Write the mean of the run's newest N checkpoints.")
    ] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that exists at --out.")] = False,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="Write a checkpoint whose multipliers and scales are folded into plain weights; other formats always "
            "fold.",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits and tokens with the format's own software after writing.")
    ] = False,
    license: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="License in the model card, by the Hub's identifier: apache-2.0, mit, cc-by-4.0, ..."
        ),
    ] = "unknown",
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME", help="Upload the Hugging Face folder to this repository on the Hub.", show_default=False
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repository private.")] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="List the formats and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Convert a checkpoint to another format, such as a Hugging Face folder, or another format to a checkpoint.

    Learned scales (model.multipliers and others) become part of the weights; --fold does that to a checkpoint.

    Without --out, an earlier export is replaced if none of its files has changed since. Anything else needs
    --overwrite.
    """
    if list_formats:
        _list_formats(as_json=as_json)
        return
    writer = format_named("--to", to) if to is not None else None
    reader = format_named("--from", from_) if from_ is not None else None
    from lightlm.checkpoint import has_mtp
    from lightlm.choices import DTYPES, check_weights
    from lightlm.convert.load import locate, with_model

    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: unknown precision; use {', '.join(DTYPES)}")
    check_weights(weights)
    source = locate(model)
    reader, writer = _choose_formats(source, reader, writer, fold=fold)
    _check_quantize(quantize, writer, dtype)
    if license != "unknown" or push is not None or private:
        writer = _publisher(writer, license, push, private)
    variant = (f"-average{average}" if average > 1 else "") + (f"-{weights}" if weights else "")
    if variant and reader.name != "lightlm":
        raise UsageError(f"--average and --weights are for a run of LightLM; {source} is in the format {reader.name}")
    if reader.name == writer.name and not fold and not variant and not quantize:
        other = ", ".join(known.name for known in FORMATS.values() if known.writes and known.name != reader.name)
        raise UsageError(f"--to {writer.name}: {source} is in that format already; formats to convert it to: {other}")
    variant += f"-{quantize}" if quantize else ""
    target = out_path or _default_target(model, source, writer, "folded" if fold else writer.name, variant)
    # --push repeats an export whose upload failed.
    repeats = (out_path is None or push is not None) and writer.is_own(target)
    _check_target(target, source, writer, repeats=repeats, overwrite=overwrite)
    if license == "unknown" and writer.name == "hf":
        _note_license(target)
    import torch

    console.print(f"Converting {source} to {target}", style="dim", markup=False, soft_wrap=True)
    write = partial(
        convert_model,
        reader=reader,
        out=target,
        writer=writer,
        dtype=getattr(torch, dtype),
        quantize=quantize or "",
        fold=fold,
        verify=verify,
        read=_other_weights(average, weights),
    )
    facts, source = with_model(model, lambda path: (write(path), path))
    if reader.name == "lightlm" and has_mtp(source):
        console.print("Its heads of multi-token prediction are left out: only training needs them", style="dim")
    if push is not None:
        from lightlm.convert.huggingface.hub import upload

        facts["address"] = upload(target, push, private=private)
    sizes = _sizes(target, facts.pop("beside", []))
    summary = {"source": str(source), "folder": str(target), "format": writer.name, "dtype": dtype, **facts}
    summary |= {"quantize": quantize, "weights": weights, "average": average}
    summary |= {"files": sizes, "bytes": sum(sizes.values())}
    if as_json:
        print_json(summary)
    else:
        _print(summary)


def _list_formats(*, as_json: bool) -> None:
    """Print each format, what it reads and writes, its quantizations, and what it needs."""
    if as_json:
        names = ("reads", "writes", "takes", "makes", "kinds", "quantizations", "package", "verifier")
        values = [{name: getattr(known, name) for name in names} for known in FORMATS.values()]
        print_json([{"format": known.name, **value} for known, value in zip(FORMATS.values(), values, strict=True)])
        return
    columns = ("format", "reads", "writes", "--quantize", "needs")
    rows = [(each.name, each.takes or "-", each.makes or "-", *_extras(each)) for each in FORMATS.values()]
    print_table(rows, *columns)
    out.print(f"For what is in brackets, {how_to_install('EXTRA')}", style="dim", markup=False, soft_wrap=True)


def _extras(known: Format) -> tuple[str, str]:
    """Return the quantizations of a format, and the extra that installs what it needs."""
    extra = f"[{known.name}]"
    need = extra if known.package else f"{extra} for --verify" if known.verifier else "-"
    return ", ".join(known.quantizations) or "-", need


def _default_target(model: str | None, source: Path, writer: Format, name: str, variant: str) -> Path:
    """Return where to write without --out.

    For a run it is `runs/RUN/hf` or `runs/RUN/folded`, with the step in the name if the checkpoint was named; else it
    is beside the model. A format that writes a file gets `runs/RUN/RUN.gguf`.

    Args:
        name: that of the folder.
        variant: names weights that are not the model's own.
    """
    from lightlm.convert.load import is_hub_id
    from lightlm.runs import run_of

    ending = f"{variant}{writer.suffix}" if writer.suffix else f"-{name}{variant}"
    if model is not None and is_hub_id(model):
        return Path(f"{Path(model).name}{ending}")
    run = run_of(source)
    if run is None:
        target = source.resolve().with_name(f"{source.stem if source.is_file() else source.resolve().name}{ending}")
    else:
        named = model is not None and Path(model).resolve() == source.resolve()
        step = (f"-{source.name}" if named else "") + variant
        target = run / f"{run.name if writer.suffix else name}{step}{writer.suffix}"
    return target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target


def _choose_formats(source: Path, reader: Format | None, writer: Format | None, *, fold: bool) -> tuple[Format, Format]:
    """Return the formats to read and to write; None is the default. Raises UsageError where they do not fit."""
    if reader is not None and not reader.detect(source):
        raise UsageError(f"--from {reader.name}: {source} is not in that format; leave --from out to detect the format")
    reader = reader or reader_of(source)
    writer = writer or FORMATS["hf" if reader.name == "lightlm" and not fold else "lightlm"]
    if fold and writer.folds:
        raise UsageError(f"--fold: a conversion to {writer.name} always folds; leave it out")
    return reader, writer


def _other_weights(average: int, weights: str | None) -> "Callable[[Path], LoadedModel] | None":
    """Return what loads the weights of --average and --weights; None for the model's own."""
    if average > 1:
        from lightlm.convert.average import load_average

        return partial(load_average, count=average, weights=weights)
    return None if weights is None else partial(read_model, weights=weights)


def _sizes(target: Path, beside: list[Path]) -> dict[str, int]:
    """Return the bytes of each file that was written; `beside` are those that go with a single file."""
    folder = target if target.is_dir() else target.parent
    written = sorted(filter(Path.is_file, target.rglob("*"))) if target.is_dir() else [target, *beside]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}


def _check_quantize(quantize: str | None, writer: Format, dtype: str) -> None:
    """Refuse a quantization that the format does not have, or one beside a precision."""
    if quantize is None:
        return
    if quantize not in writer.quantizations:
        raise UsageError(f"--quantize {quantize}: {writer.name} does not have it; known: {_QUANTIZATIONS}")
    if dtype != "float32":
        raise UsageError(f"--quantize {quantize} takes the place of --dtype {dtype}; leave one of them out")


def _note_license(target: Path) -> None:
    """Say that the license of the folder that an export replaces is not kept: it may be that of another model."""
    from lightlm.convert.huggingface.card import license_of

    if (earlier := license_of(target)) != "unknown":
        console.print(
            f"{target / 'README.md'} said license: {earlier}, and the new one says unknown; to keep it, give "
            f"--license {earlier}",
            markup=False,
            soft_wrap=True,
        )


def _publisher(writer: Format, license: str, repository: str | None, private: bool) -> Format:
    """Return the writer of a folder for the Hub; refuse what could not be uploaded, before anything is converted."""
    from lightlm.convert.huggingface.format import HuggingFaceFolder
    from lightlm.convert.huggingface.hub import check_license, check_upload

    if not isinstance(writer, HuggingFaceFolder):
        raise UsageError(f"--license, --push and --private are for a Hugging Face folder, not for {writer.name}")
    if private and repository is None:
        raise UsageError("--private is for an upload; name the repository with --push ORG/NAME")
    if repository is not None:
        check_upload(repository)
    return HuggingFaceFolder(check_license(license), repository or "")


def _check_target(target: Path, source: Path, writer: Format, *, repeats: bool, overwrite: bool) -> None:
    """Refuse to write where something would be lost, or to give a file the name of a folder or of another format."""
    if writer.suffix and (target.is_dir() or target.suffix.lower() != writer.suffix):
        name = (
            target / f"{target.resolve().name}{writer.suffix}" if target.is_dir() else target.with_suffix(writer.suffix)
        )
        raise UsageError(f"--out {target}: {writer.name} is a file *{writer.suffix}; write --out {name.as_posix()}")
    if not writer.suffix and target.is_file():
        raise UsageError(f"--out {target}: {writer.name} is a folder, and this is a file; choose another path")
    if source.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target} is or holds the model to convert; choose another path with --out")
    files.refuse_working_folder(target)
    if not overwrite and (changed := writer.changed_beside(target)) is not None:
        raise UsageError(
            f"{changed} would be replaced, and it is not what an export wrote; move it, or replace it with --overwrite"
        )
    if not target.exists() or (target.is_dir() and not files.names_in(target)):
        return
    if (target / ".git").exists():
        raise UsageError(f"{target} is a git repository, so it is not replaced; choose another path with --out")
    if format_of(target) is None or not (target.is_file() or holds_weights(target)):
        raise UsageError(f"{target} exists and is not a model, so it is not replaced; choose another path with --out")
    if not (repeats or overwrite):
        raise UsageError(f"{target} exists already; choose another path with --out, or replace it with --overwrite")


def _print(summary: dict[str, Any]) -> None:
    rows = {
        "class": summary["class"],
        "parameters": f"{summary['parameters']:,}",
        "dtype": summary["quantize"] or summary["dtype"],
    }
    if "max_logit_difference" in summary:
        rows["verified"] = f"logits differ by {summary['max_logit_difference']:.1e} at most"
    rows |= {name: f"{size:,} bytes" for name, size in summary["files"].items()}
    print_table([*rows.items(), ("total", f"{summary['bytes']:,} bytes")])
    lines = [f"Written to {Path(summary['folder']).as_posix()}", summary["python"]]
    if "address" in summary:
        lines.append(f"Uploaded to {summary['address']}")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
