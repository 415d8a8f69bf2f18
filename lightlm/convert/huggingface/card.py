"""The README.md of an export: the Hub's metadata, and where the model, its data and its scores come from."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from lightlm import __version__
from lightlm.checkpoint import MODEL_WEIGHTS, RAW_WEIGHTS, LoadedModel
from lightlm.data.folder import read_manifest, resolve_dataset
from lightlm.data.tokenizer.named import NAMED_TOKENIZERS as NAMED_MODELS
from lightlm.errors import LightLMError
from lightlm.quantities import format_quantity
from lightlm.recipe import Recipe, load_run_recipe
from lightlm.runs import run_of

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"

_PAGE = """---
{metadata}
---

# {title}

A language model of {parameters:,} parameters, exported from LightLM {version} as `{architecture}`.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{path}")
    model = AutoModelForCausalLM.from_pretrained("{path}")

## Origin

- Exported from {source}.
{origin}

## Scores

{scores}

## License

None is chosen yet. Before you publish the model, replace `license: unknown` at the top of this file, and check what the
license of the training data asks for.
"""


def model_card(loaded: LoadedModel, out: Path, *, architecture: str, parameters: int) -> str:
    """Return the card of an export to the folder `out`.

    Data and scores are those that the run's recipe, data folder and `eval/` say. What they do not say is named as
    unknown.
    """
    run = run_of(loaded.path)
    recipe = _recipe(run) if run else None
    # The mean of several checkpoints has not been scored: results are of one of them.
    file = loaded.weights[0].name if len(loaded.weights) == 1 else None
    results = list(_scores(run, loaded.path.resolve().name, file)) if run and file else []
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="unknown",
        tags=["lightlm"],
        base_model=_base_on_hub(recipe),
        datasets=_hub_data(recipe) or None,
        model_name=loaded.name,
        eval_results=results or None,
    )
    return _PAGE.format(
        metadata=metadata.to_yaml().strip(),
        title=loaded.name,
        parameters=parameters,
        version=__version__,
        architecture=architecture,
        path=out.as_posix(),
        source=_source(loaded),
        origin="\n".join(f"- {line}" for line in _origin(recipe)),
        scores=_score_table(results),
    )


def _recipe(run: Path) -> Recipe | None:
    try:
        return load_run_recipe(run)
    except (LightLMError, OSError):  # a run that another version made, or a damaged one
        return None


def _origin(recipe: Recipe | None) -> Iterator[str]:
    if recipe is None:
        yield "Training data and recipe: unknown to LightLM."
        return
    for folder in map(resolve_dataset, recipe.data.sources):
        try:
            manifest = read_manifest(folder)
        except LightLMError:  # the data was moved, or is in a format without a manifest
            yield f"Training data: `{folder.as_posix()}`."
            continue
        # A local path tells readers of a published card nothing: its last part is enough.
        local = Path(manifest.source).is_absolute() or Path(manifest.source).exists()
        source = Path(manifest.source).name if local else manifest.source
        revision = f", revision {manifest.revision}" if manifest.revision and not local else ""
        size = format_quantity(manifest.tokens("train"))
        yield f"Training data: `{source}` ({manifest.description}{revision}), {size} tokens."
    if recipe.train.init_from is not None:
        yield f"Finetuned from `{recipe.train.init_from}`."
    yield f"Recipe: `{recipe.name}`, {format_quantity(recipe.train.tokens)} training tokens in all."


def _base_on_hub(recipe: Recipe | None) -> str | None:
    """Return the id on the Hub of the model that the run started from; None if it started from another place."""
    start = None if recipe is None else recipe.train.init_from
    name = NAMED_MODELS.get(start, start) if start else ""
    return name if re.fullmatch(_HUB_ID, name) and not Path(name).exists() else None


def _hub_data(recipe: Recipe | None) -> list[str]:
    """Return the ids on the Hub of the data sets that come from there."""
    names = []
    for folder in map(resolve_dataset, recipe.data.sources if recipe else ()):
        try:
            source = read_manifest(folder).source
        except LightLMError:
            continue
        found = re.match(rf"(?:hf://)?({_HUB_ID})", source)
        names += [found[1]] if found and not Path(source).exists() else []
    return names


def _source(loaded: LoadedModel) -> str:
    last = (
        "the last weights, not their average, of " if any(file.name == RAW_WEIGHTS for file in loaded.weights) else ""
    )
    if len(loaded.weights) > 1 and run_of(loaded.path) is not None:
        return f"the mean of {last}" + ", ".join(f"`{file.parent.as_posix()}`" for file in loaded.weights)
    return f"{last}`{loaded.path.as_posix()}`"


def _scores(run: Path, step: str, file: str) -> Iterator[EvalResult]:
    """Yield the scores of one checkpoint in the run's `eval/`, without those of trials with --limit.

    Args:
        file: the file of weights that was scored.
    """
    for path in sorted((run / "eval").glob(f"{step}_*.json")):
        try:
            meta = path.with_suffix(".meta.json")  # missing if another tool wrote the results
            scored = json.loads(meta.read_text(encoding="utf-8")).get("weights") if meta.exists() else None
            if file not in (scored or {MODEL_WEIGHTS: ""}):
                continue
            results = json.loads(path.read_text(encoding="utf-8"))
            if "results" not in results or results.get("config", {}).get("limit") is not None:
                continue
            for task, metrics in results["results"].items():
                for key, value in metrics.items():
                    metric, _, filtered = key.partition(",")
                    if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                        name = metric if filtered == "none" else f"{metric} ({filtered})"
                        yield EvalResult("text-generation", task, task, name, round(value, 4))
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # not lm-eval's results; a report names such a file


def _score_table(results: list[EvalResult]) -> str:
    if not results:
        return "None measured. `lightlm eval` measures them; a new export then includes them."
    rows = [f"| {result.dataset_name} | {result.metric_type} | {result.metric_value} |" for result in results]
    return "\n".join(["| Task | Metric | Value |", "| --- | --- | --- |", *rows])
