"""One evaluation: tasks on a model, lm-eval's own results, and the files that keep them."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker

from lightlm.checkpoint import LoadedModel
from lightlm.evaluate.compare.comparison import Answers, answers_of
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results import documents, store
from lightlm.evaluate.settings import BOS
from lightlm.evaluate.tasks.heldout import common_folder
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.patches import compiled_once, quiet


def run_tasks(
    lm: LightLM, tasks: Tasks, *, bootstrap_iters: int = 100_000, log_samples: bool = False
) -> dict[str, Any]:
    """Evaluate one model and return lm-eval's results, as its command would write them.

    Args:
        bootstrap_iters: resamples for standard errors, lm-eval's default; 0 leaves standard errors out.
        log_samples: add `samples`: the documents of each task with prompts, answers and figures.

    Raises:
        DataError: a data set cannot be read.
        LightLMError: the model's context is too short for a task.
    """
    path = lm.loaded.path
    tasks.for_model(lm, path)
    tracker = EvaluationTracker()
    arguments = {"pretrained": str(path), "dtype": str(lm.model.embed_tokens.weight.dtype).removeprefix("torch.")}
    with quiet(), compiled_once():
        results: dict[str, Any] = simple_evaluate(
            model=lm,
            model_args=arguments,
            tasks=tasks.names,
            task_manager=tasks,
            limit=tasks.settings.limit,
            bootstrap_iters=bootstrap_iters,
            num_fewshot=tasks.settings.num_fewshot,
            batch_size=lm.limits.sequences or "auto",
            device=str(lm.device),
            evaluation_tracker=tracker,
            log_samples=log_samples,
        )
    tracker.general_config_tracker.log_end_time()
    results["task_hashes"] = {}
    results.update(asdict(tracker.general_config_tracker))
    results["config"]["model"] = results["model_source"] = "lightlm"
    return results


@dataclass(frozen=True)
class Evaluation:
    """A scored model.

    Args:
        file: the results; None if they are not stored.
        facts: settings, sizes, device and duration.
        answers: every figure, with its value for each document.
    """

    file: Path | None
    facts: dict[str, Any]
    answers: list[Answers]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        results = [asdict(answers.row) for answers in self.answers]
        return {**self.facts, "file": str(self.file) if self.file else None, "results": results}


def evaluate_model(
    loaded: LoadedModel,
    tasks: Tasks,
    name: str,
    file: Path | None,
    *,
    batch_size: str = "auto",
    log_samples: bool = False,
) -> Evaluation:
    """Run the tasks on a model and write its files (see `lightlm.evaluate.results.store`).

    Args:
        name: the model's name in tables.
        file: the results; None stores nothing.
        log_samples: also write prompts and answers.
    """
    started = time.perf_counter()
    weights = store.hash_weights(loaded)  # before a run that is being trained deletes them
    lm = LightLM(loaded, batch_size=batch_size, add_bos_token=BOS[tasks.settings.bos])
    results = run_tasks(lm, tasks, log_samples=True)
    samples = results.pop("samples")
    scored = documents.of_samples(samples)
    counts = loaded.model.num_parameters()
    data = common_folder([loaded.path], tasks.settings.data) if tasks.read_data else None
    facts: dict[str, Any] = {
        "model": name,
        "path": str(loaded.path),
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "flops_per_token": loaded.model.flops_per_token(loaded.model.config.max_seq_len),
        **asdict(tasks.settings),
        "bos": lm.describe_bos(tasks.settings.bos),
        "data": None if data is None else data.as_posix(),
        "device": str(lm.device),
        "dtype": results["config"]["model_args"]["dtype"],
        "batch_size": batch_size,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if file is not None:
        store.write(file, results, facts | store.provenance(loaded, weights, tasks.data_sets.origins, lm.device))
        documents.write(documents.documents_file(file), scored)
        if log_samples:
            store.write_samples(file, samples)
    return Evaluation(file, facts, answers_of(name, results, scored, facts))
