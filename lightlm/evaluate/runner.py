"""One evaluation: tasks on a model, lm-eval's own results, and the files that keep them."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.loggers import EvaluationTracker

from lightlm import files
from lightlm.checkpoint import LoadedModel
from lightlm.evaluate.compare.comparison import Answers, answers_of
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.one_by_one import Around, OneByOne
from lightlm.evaluate.results import board, documents, store
from lightlm.evaluate.results.truncation import Truncation
from lightlm.evaluate.settings import BOS, Settings
from lightlm.evaluate.tasks.checks import describe
from lightlm.evaluate.tasks.heldout import without_companions
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.patches import compiled_once, quiet

_SAVE_SECONDS = 30.0  # between writings of what is finished, in case the process is killed


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    Args:
        results: lm-eval's results of the tasks that worked, as its command would write them.
        failed: reasons of the others.
        truncated: how the requests were cut, by task.
        chances: the accuracy that guessing reaches, by task with choices.
        interruption: what ended the evaluation early, such as Ctrl-C.
    """

    results: dict[str, Any]
    failed: dict[str, str]
    truncated: dict[str, Truncation]
    chances: dict[str, float]
    interruption: BaseException | None


def run_tasks(
    lm: LightLM,
    tasks: Tasks,
    *,
    data: Path | None = None,
    bootstrap_iters: int = 100_000,
    log_samples: bool = False,
    around: Around = contextlib.nullcontext,
    on_done: Callable[[Outcome], object] = lambda outcome: None,
) -> Outcome:
    """Evaluate one model.

    Args:
        data: the data folder of heldout; None uses that of the settings or of the model's run.
        bootstrap_iters: resamples for standard errors, lm-eval's default; 0 leaves standard errors out.
        log_samples: add `samples`: the documents of each task with prompts, answers and figures.
        around: makes a context manager for the scoring of each task.
        on_done: called after each task but the last with what is finished.

    Raises:
        DataError: some tasks cannot be scored, found before any is (the message lists all of them); or all failed.
    """
    path = lm.loaded.path
    tasks.for_model(lm, path, data)
    tracker = EvaluationTracker()
    dtype = str(lm.model.embed_tokens.weight.dtype).removeprefix("torch.")
    arguments = {"pretrained": str(path), "dtype": dtype}
    if (settings := tasks.settings).apply_chat_template:
        lm.require_chat_template(settings.system_instruction)
    off_protocol: list[str] = []

    def outcome(results: dict[str, Any]) -> Outcome:
        if tasks.board:
            off_protocol[:] = board.add_index(results, dtype, settings)
        return Outcome(results, each.failed, each.truncated, each.chances, each.interruption)

    each = OneByOne(tasks.note, around, lambda results: on_done(outcome(results)))
    with quiet(), compiled_once(), mock.patch.object(evaluator, "evaluate", each):
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=lm,
            model_args=arguments,
            tasks=tasks.names,
            task_manager=tasks,
            limit=settings.limit,
            bootstrap_iters=bootstrap_iters,
            num_fewshot=settings.num_fewshot,
            apply_chat_template=settings.apply_chat_template,
            system_instruction=settings.system_instruction,
            fewshot_as_multiturn=settings.apply_chat_template and settings.fewshot_as_multiturn is not False,
            batch_size=lm.limits.sequences or "auto",
            device=str(lm.device),
            evaluation_tracker=tracker,
            log_samples=log_samples,
        )
    tracker.general_config_tracker.log_end_time()
    results["task_hashes"] = {}
    results.update(asdict(tracker.general_config_tracker))
    results["config"]["model"] = results["model_source"] = "lightlm"
    final = outcome(results)
    if off_protocol:
        tasks.note(f"{board.BOARD} is not scored as on the leaderboard: {', '.join(off_protocol)}")
    return final


@dataclass(frozen=True)
class Evaluation:
    """A scored model.

    Args:
        file: the results; None if they are not stored.
        facts: settings, sizes, device and duration; `failed` has the reasons of tasks without results.
        answers: every figure, with its value for each document.
        problems: what went wrong, in sentences: tasks that failed, and results that could not be stored.
        interruption: what ended the evaluation early, such as Ctrl-C. The results are those of the finished tasks.
    """

    file: Path | None
    facts: dict[str, Any]
    answers: list[Answers]
    problems: list[str]
    interruption: BaseException | None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        results = [asdict(answers.row) for answers in self.answers]
        return {**self.facts, "file": str(self.file) if self.file else None, "results": results}


def evaluate_model(
    loaded: LoadedModel,
    tasks: Tasks,
    name: str,
    place: Callable[[Settings], Path | None],
    *,
    data: Path | None = None,
    batch_size: str = "auto",
    log_samples: bool = False,
) -> Evaluation:
    """Run the tasks on a model and write its files (see `lightlm.evaluate.results.store`).

    Args:
        name: the model's name in tables.
        place: returns the file for the results of these settings; None stores nothing. It is asked again, for the
            tasks that worked, if others failed. If that file exists or is the same, the results go to
            `store.progress_file`: those of a part never replace those of the whole.
        data: the data folder of heldout; None uses that of the settings or of the model's run.
        log_samples: also write prompts and answers.

    Raises:
        DataError: some tasks cannot be scored, found before any is; or all failed.
    """
    started = saved = time.monotonic()
    weights = store.hash_weights(loaded)  # before a run that is being trained deletes them
    lm = LightLM(loaded, batch_size=batch_size, add_bos_token=BOS[tasks.settings.bos])
    if data is None:
        data = tasks.find_data([loaded.path], tasks.settings.data)
    counts, settings = loaded.model.num_parameters(), tasks.settings

    def facts_of(outcome: Outcome) -> dict[str, Any]:
        return {
            "model": name,
            "path": str(loaded.path),
            "parameters": counts["total"],
            "active_parameters": counts["active"],
            "flops_per_token": loaded.model.flops_per_token(loaded.model.config.max_seq_len),
            **asdict(settings),
            "chosen": settings.chosen,
            "bos": lm.describe_bos(settings.bos),
            "data": data.as_posix() if data is not None and tasks.read_data else None,
            "device": str(lm.device),
            "dtype": str(loaded.model.embed_tokens.weight.dtype).removeprefix("torch."),
            "batch_size": batch_size,
            "seconds": round(time.monotonic() - started, 2),
            "truncated": {task: cut.to_dict() for task, cut in outcome.truncated.items() if cut.cut},
            "chances": outcome.chances,
            "failed": outcome.failed,
        }

    def save_progress(outcome: Outcome) -> None:
        nonlocal saved
        if (file := place(settings)) is None or time.monotonic() - saved < _SAVE_SECONDS:
            return
        samples = outcome.results.pop("samples")
        with contextlib.suppress(OSError):  # reported at the end; the table still shows the scores
            store.write(store.progress_file(file), outcome.results, facts_of(outcome), documents.of_samples(samples))
        saved = time.monotonic()

    outcome = run_tasks(lm, tasks, data=data, log_samples=True, on_done=save_progress)
    facts, results = facts_of(outcome), outcome.results
    samples = results.pop("samples")
    scored = documents.of_samples(samples)
    problems = [describe(outcome.failed)] if outcome.failed else []
    complete = not outcome.failed and outcome.interruption is None
    file = whole = place(settings)
    if not complete:
        file = place(replace(settings, tasks=without_companions(samples)))
    if file is not None and whole is not None:
        # `--out FILE` names one file for any tasks; another one may hold all parts of these.
        if not complete and (file == whole or file.exists()):
            file = store.progress_file(whole)
        try:
            provenance = store.provenance(loaded, weights, tasks.data_sets.origins, lm.device)
            store.write(file, results, facts | provenance, scored)
            if log_samples:
                store.write_samples(file, samples)
            if file != store.progress_file(whole):
                store.remove_progress(whole)
        except files.DiskFullError as error:
            problems.append(str(error))
            file = None
        except OSError as error:
            problems.append(f"the results of {name} could not be stored: {error.strerror}: {error.filename or file}")
            file = None
    return Evaluation(file, facts, answers_of(name, results, scored, facts), problems, outcome.interruption)
