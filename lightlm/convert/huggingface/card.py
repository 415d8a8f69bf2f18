"""The README.md of an export: the Hub's metadata, and where the model, its data and its scores come from."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from lightlm import __version__
from lightlm.checkpoint import MODEL_WEIGHTS, RAW_WEIGHTS, LoadedModel
from lightlm.data.folder import read_manifest, resolve_dataset
from lightlm.data.tokenizer.named import NAMED_TOKENIZERS as NAMED_MODELS
from lightlm.errors import LightLMError
from lightlm.model.transformer import Transformer
from lightlm.quantities import format_quantity
from lightlm.recipe import STORED, Recipe, load_run_recipe
from lightlm.runs import run_of
from lightlm.runs.metrics import METRICS

# Metrics of docs/metrics.md, and their names on a card.
_LOSSES = {"val_loss": "loss (nats per token)", "val_bpb": "bits per byte"}
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"

_PAGE = """---
{metadata}
---

# {title}

A language model of {parameters:,} parameters, exported from LightLM {version} as `{architecture}`.

## How to use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{path}")
    model = AutoModelForCausalLM.from_pretrained("{path}")
{use}

## Model

{shape}

## Origin

- Exported from {source}.
{origin}

## Scores

{scores}

## Limits

Nobody has checked the model's answers for truth or harm. It repeats what its training data says, errors and prejudice
included.

## License

{license}
{recipe}"""
_CONTINUE = """    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))

Or with LightLM: `lightlm generate "Once upon a time" --checkpoint {}`"""
# Without its template, a model that learned conversations gets a text unlike any that it has seen.
_ANSWER = """    messages = [{{"role": "user", "content": "Hello"}}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=50)[0]
    print(tokenizer.decode(output[inputs["input_ids"].shape[1]:], skip_special_tokens=True))

Or with LightLM: `lightlm generate --chat "Hello" --checkpoint {}`"""
_NO_LICENSE = """None is chosen yet. Before you publish the model, replace `license: unknown` at the top of this file,
or export it with `--license`, and check what the licenses of the training data and of a base model ask for."""
_LICENSED = "`{}` for the weights. Training data and a base model may have licenses of their own."
_RECIPE = """
## Recipe

`lightlm train recipe.yaml` trains such a model with this file:

```yaml
{}
```
"""


def model_card(loaded: LoadedModel, path: str, *, architecture: str, parameters: int, license: str) -> str:
    """Return the card of an export.

    Data and scores are those that the run's recipe, data folder, metrics and `eval/` say. What they do not say is named
    as unknown.

    Args:
        path: what users load: a folder, or an id on the Hub.
        license: the Hub's identifier of the license, or `unknown`.
    """
    run = run_of(loaded.path)
    recipe = _recipe(run) if run else None
    # The mean of several checkpoints has not been scored: results are of one of them.
    file = loaded.weights[0].name if len(loaded.weights) == 1 else None
    results = list(_scores(run, loaded.path.resolve().name, file)) if run and file else []
    measured = _measured(run, loaded.path.resolve().name) if run else {}
    losses = _losses(measured, file)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
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
        path=path,
        use=(_ANSWER if "chat_template" in loaded.tokenizer.settings else _CONTINUE).format(shlex.quote(path)),
        shape=_table(("", ""), _shape(loaded.model)),
        source=_source(loaded),
        origin="\n".join(f"- {line}" for line in _origin(recipe, measured.get("tokens"))),
        scores=_score_table(results, losses),
        license=_NO_LICENSE if license == "unknown" else _LICENSED.format(license),
        recipe="" if recipe is None else _RECIPE.format(recipe.to_yaml().strip()),
    )


def license_of(folder: Path) -> str:
    """Return the license that the card of a folder names; `unknown` without a card or a license."""
    try:
        return str(ModelCard.load(folder / "README.md").data.license or "unknown")
    except (OSError, TypeError, ValueError, YAMLError):  # not a card
        return "unknown"


def _shape(model: Transformer) -> Iterator[tuple[str, str]]:
    """Yield what a reader wants to know of a model's shape."""
    config, counts = model.config, model.num_parameters()
    if counts["active"] != counts["total"]:
        yield "Parameters per token", f"{counts['active']:,}"
    yield "Layers", f"{config.depth} of width {config.hidden_size}"
    if config.attention == "mla":
        yield "Attention", f"{config.num_heads} heads of {config.head_dim}, latents of {config.kv_lora_rank} (MLA)"
    else:
        yield "Attention", f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    if config.num_experts:
        yield "Experts", f"{config.num_experts} per layer, of which a token is sent to {config.num_experts_per_tok}"
    yield "Context", f"{config.max_seq_len:,} tokens"
    yield "Vocabulary", f"{config.vocab_size:,} tokens"


def _measured(run: Path, step: str) -> dict[str, float]:
    """Return the metrics that the run wrote at a checkpoint's step."""
    number = int(step.rpartition("_")[2]) if step.rpartition("_")[2].isdigit() else -1
    names = {"tokens", "val_loss_raw", *_LOSSES}
    found: dict[str, float] = {}
    try:
        with (run / METRICS).open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row["step"] == number:
                    found |= {key: round(row[key], 4) for key in names & row.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged; a report names such a file
        return {}
    return found


def _losses(measured: dict[str, float], file: str | None) -> list[tuple[str, float]]:
    """Return the validation losses of one file of weights, in words; none of the mean of several checkpoints."""
    names = {"val_loss_raw": "loss (nats per token)"} if file == RAW_WEIGHTS else _LOSSES
    return [(words, measured[key]) for key, words in names.items() if file and key in measured]


def _recipe(run: Path) -> Recipe | None:
    try:
        return load_run_recipe(run)
    except (LightLMError, OSError):  # a run that another version made, or a damaged one
        return None


def _origin(recipe: Recipe | None, tokens: float | None) -> Iterator[str]:
    """Yield the lines about data and training.

    Args:
        tokens: how many the run had read at this checkpoint; None if its metrics do not say.
    """
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
        description = manifest.description.partition(" under ")[0] if local else manifest.description
        revision = f", revision {manifest.revision}" if manifest.revision and not local else ""
        size, documents = format_quantity(manifest.tokens("train")), f"{manifest.documents('train'):,} documents"
        yield f"Training data: `{source}` ({description}{revision}), {size} tokens of {documents}."
    if recipe.train.init_from is not None:
        yield f"Finetuned from `{recipe.train.init_from}`."
    if recipe.train.distill is not None and recipe.train.distill.teacher != STORED:
        yield f"Distilled from `{recipe.train.distill.teacher}`."
    total = format_quantity(recipe.train.tokens)
    reached = f"{total} training tokens in all"
    if tokens is not None and tokens < recipe.train.tokens:
        reached = f"after {format_quantity(tokens)} of {total} training tokens"
    yield (
        f"Recipe: `{recipe.name}`, {reached}, "
        f"{format_quantity(recipe.train.batch_tokens)} per step, by {recipe.optimizer.name}."
    )


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
        found = re.match(rf"(?:hf:(?://)?)?({_HUB_ID})", source)
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


def _score_table(results: list[EvalResult], losses: list[tuple[str, float]]) -> str:
    rows = [("validation split", name, str(value)) for name, value in losses]
    rows += [(result.dataset_name, result.metric_type, str(result.metric_value)) for result in results]
    if not rows:
        return "None measured. `lightlm eval` measures them; a new export then includes them."
    return _table(("Task", "Metric", "Value"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
