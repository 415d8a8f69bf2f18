"""A search beyond a grid: optuna's TPE draws values from ranges and lists, and learns from the runs that are done.

The sweep's folder is the only record. Each draw comes from a new study that is told all trials so far, so that a search
that was killed continues from what its runs have found.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightlm.errors import RecipeError, UsageError, how_to_install
from lightlm.sweep.cells import Contestant, contestant, read_recipe
from lightlm.sweep.engine import Ending
from lightlm.sweep.run import Sweep
from lightlm.sweep.table import Results
from lightlm.sweep.values import Range

_ATTEMPTS = 20  # draws in a row that are refused or known already; then the search ends
Space = Mapping[str, Range | Sequence[str]]


def run_search(
    sweep: Sweep, recipe: str, space: Space, fixed: Sequence[str], seeds: Sequence[int], trials: int, metric: str | None
) -> Ending:
    """Run the recipe as it is, the baseline, and then `trials` draws, of which earlier calls may have run some.

    Args:
        space: where the values of each key come from.
        fixed: overrides of all runs.
        metric: as in `Sweep.results`; the mean over seeds counts.

    Raises:
        UsageError: optuna is not installed.
        RecipeError: the recipe has mistakes, or no draw gives a recipe without.
    """
    require_optuna()
    _check_space(recipe, space, fixed)
    base = contestant(recipe, {}, fixed)
    earlier = [entry.contestant for entry in sweep.definition.entries.values() if entry.contestant.name != base.name]
    sweep.add([base, *earlier], seeds)
    while (ending := sweep.run()) == "complete":
        known = [entry.contestant.values for entry in sweep.definition.entries.values() if entry.contestant.values]
        if len(known) >= trials:
            break
        scored = _scores(sweep.results(metric))
        # The seeds of one draw run at a time as well.
        wanted = min(max(sweep.jobs // len(seeds), 1), trials - len(known))
        if not _add_draws(sweep, recipe, space, fixed, seeds, scored, wanted):
            sweep.watch.note(f"{_ATTEMPTS} draws in a row were known already: the search has tried what there is")
            break
    return ending


def require_optuna() -> None:
    """Raise UsageError if optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError(f"--search needs optuna; {how_to_install('search')}") from None


def _check_space(recipe: str, space: Space, fixed: Sequence[str]) -> None:
    """Raise RecipeError if no draw gives a valid recipe, as with an unknown key, before the baseline is trained."""
    problem: RecipeError | None = None
    for seed in range(_ATTEMPTS):
        try:
            read_recipe(recipe, contestant(recipe, draw(space, (), seed), fixed).changes)
            return
        except RecipeError as error:
            problem = error
    assert problem is not None
    raise problem


def _scores(results: Results) -> list[tuple[Mapping[str, str], float]]:
    """Return values and score of each trial, less being better; infinity for one that has diverged or failed."""
    sign = -1.0 if results.more_is_better else 1.0
    return [
        (line.contestant.values, math.inf if whole is None else sign * whole)
        for line in results.lines
        if line.contestant.values
        for whole in [line.mean if len(line.finals) == len(line.states) else None]
    ]


def _add_draws(
    sweep: Sweep,
    recipe: str,
    space: Space,
    fixed: Sequence[str],
    seeds: Sequence[int],
    scored: Sequence[tuple[Mapping[str, str], float]],
    wanted: int,
) -> bool:
    """Add new draws to the sweep, at most `wanted`; return whether there is one."""
    refused: list[tuple[Mapping[str, str], float]] = []
    problem: RecipeError | None = None
    found: dict[str, Contestant] = {}
    for attempt in range(_ATTEMPTS):
        known = [*scored, *refused, *((entry.values, None) for entry in found.values())]
        drawn = contestant(recipe, draw(space, known, seed=len(scored) + attempt), fixed)
        if drawn.name in sweep.definition.entries or drawn.name in found:
            continue
        try:
            sweep.add([drawn], seeds)
        except RecipeError as error:  # values that do not fit together
            problem = error
            refused.append((drawn.values, math.inf))
            continue
        found[drawn.name] = drawn
        if len(found) == wanted:
            break
    if not found and problem is not None:
        raise problem
    return bool(found)


def draw(space: Space, trials: Sequence[tuple[Mapping[str, str], float | None]], seed: int) -> dict[str, str]:
    """Return the next values to try, after trials with their scores; None for one that runs."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # optuna 4 calls constant_liar one
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    distributions = {key: _distribution(values) for key, values in space.items()}
    for values, score in trials:
        known = {key: _read(space[key], values[key]) for key in space if key in values}
        # An earlier call may have searched another space.
        if len(known) < len(space) or not all(_lies_in(space[key], value) for key, value in known.items()):
            continue
        state = optuna.trial.TrialState.RUNNING if score is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(optuna.trial.create_trial(params=known, distributions=distributions, value=score, state=state))
    drawn = study.ask(distributions).params
    return {key: _write(space[key], drawn[key]) for key in space}


def _distribution(values: Range | Sequence[str]) -> Any:
    from optuna import distributions

    if not isinstance(values, Range):
        return distributions.CategoricalDistribution(tuple(values))
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.logarithmic)
    return distributions.FloatDistribution(values.low, values.high, log=values.logarithmic)


def _read(values: Range | Sequence[str], text: str) -> Any:
    if not isinstance(values, Range):
        return text
    try:
        return int(text) if values.whole else float(text)
    except ValueError:
        return text


def _write(values: Range | Sequence[str], value: Any) -> str:
    """Return a value as an override has it: numbers in three digits, which name its runs."""
    if not isinstance(values, Range):
        return str(value)
    return str(value) if values.whole else f"{min(max(float(f'{value:.3g}'), values.low), values.high):g}"


def _lies_in(values: Range | Sequence[str], value: Any) -> bool:
    if not isinstance(values, Range):
        return value in values
    return isinstance(value, int | float) and values.low <= value <= values.high
