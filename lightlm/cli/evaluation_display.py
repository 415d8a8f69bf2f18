"""The table that `lightlm eval` prints."""

from typing import Any

from lightlm.cli.console import out


def print_table(reports: list[dict[str, Any]]) -> None:
    """One model: value and standard error apart. Several: a column each, the best in bold."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("Task", "Metric")
    table.add_column("Documents", justify="right")
    single = len(reports) == 1
    for report in reports:
        table.add_column("Value" if single else escape(report["model"]), justify="right")
    if single:
        table.add_column("Stderr", justify="right")
    lines: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
    for column, report in enumerate(reports):
        for row in report["results"]:
            lines.setdefault((row["task"], row["metric"]), [None] * len(reports))[column] = row
    for names, cells in lines.items():
        task, metric = map(escape, names)
        found = next(cell for cell in cells if cell)
        documents = "" if found["documents"] is None else f"{found['documents']:,}"
        if single:
            stderr = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            table.add_row(task, metric, documents, f"{found['value']:.4f}", stderr)
        else:
            table.add_row(task, metric, documents, *_side_by_side(cells))
    out.print(table)
    if any(report["active_parameters"] != report["parameters"] for report in reports):
        _print_sizes(reports)


def _print_sizes(reports: list[dict[str, Any]]) -> None:
    """What a token costs, which with experts does not follow from the model's size."""
    from lightlm.quantities import format_quantity

    for report in reports:
        total, active, flops = (
            format_quantity(report[key]) for key in ("parameters", "active_parameters", "flops_per_token")
        )
        line = f"{report['model']}: {total} parameters, {active} active for a token, {flops} FLOPs a trained token"
        out.print(line, soft_wrap=True, markup=False)


def _side_by_side(cells: list[dict[str, Any] | None]) -> list[str]:
    values = [cell["value"] for cell in cells if cell]
    higher = next(cell for cell in cells if cell)["higher_is_better"]
    best = None if higher is None else max(values) if higher else min(values)
    texts = []
    for cell in cells:
        text = "" if cell is None else f"{cell['value']:.4f}"
        if cell and cell["stderr"] is not None:
            text += f" ± {cell['stderr']:.4f}"
        texts.append(f"[bold]{text}[/]" if cell and cell["value"] == best else text)
    return texts
