"""Mistakes in tasks that are known before anything is scored, named with task and document.

lm-eval finds some of them after hours, some never (an unknown metric has no figure, a target outside the choices counts
as wrong), and stops at the first.
"""

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import filter_registry, metric_registry
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig

from lightlm.data.sources.hub.client import first_line
from lightlm.errors import DataError, LightLMError, is_out_of_memory
from lightlm.evaluate.generation import Generation
from lightlm.evaluate.tasks.index import ROOT

_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")

# What `ConfigurableTask.process_results` computes; it silently leaves out other metrics. generate_until takes any.
_METRICS = {
    "loglikelihood": {"perplexity", "acc"},
    "loglikelihood_rolling": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
    "multiple_choice": {
        "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "brier_score", "likelihood"
    },
}  # fmt: skip


@dataclass
class Findings:
    """What is wrong with tasks.

    Args:
        problems: (task, reason) of tasks that cannot be scored.
        notes: oddities of tasks that can.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raise DataError with all problems if there are any."""
        if self.problems:
            reasons: dict[str, list[str]] = {}
            for task, reason in self.problems:
                reasons.setdefault(task, []).append(reason)
            raise DataError(describe({task: "; ".join(several) for task, several in reasons.items()}))


def describe(problems: Mapping[str, str]) -> str:
    """Return one message for tasks with the reasons why they cannot be scored."""
    if len(problems) == 1:
        return "".join(f"the task {task} cannot be scored: {reason}" for task, reason in problems.items())
    lines = (f"  {task}: {reason}" for task, reason in problems.items())
    return "\n".join([f"{len(problems)} tasks cannot be scored:", *lines])


def reason_of(error: BaseException) -> str:
    """Return an error's first line; with its type unless its message is a sentence for users."""
    if isinstance(error, LightLMError):
        return str(error)
    if is_out_of_memory(error):
        return "the device is out of memory; lower --batch-size"
    named = type(error).__name__
    return first_line(error) if first_line(error) == named else f"{named}: {first_line(error)}"


def explain(task: ConfigurableTask, error: Exception) -> str:
    """Return why lm-eval could not build a task, whose object is complete up to the failure."""
    try:
        return next(_found_in(task), reason_of(error))
    except Exception:  # the object is too incomplete to look further
        return reason_of(error)


def _found_in(task: ConfigurableTask) -> Iterator[str]:
    yield from _wrong_names(task)
    data = getattr(task, "dataset", None)
    if not isinstance(data, Mapping):
        return
    for key in _SPLITS:
        split = getattr(task.config, key)
        if split is not None and split not in data:
            yield f"{key}: its data has no split {split!r}; it has {', '.join(map(str, data))}"
    if not (task.config.test_split or task.config.validation_split):
        yield "it names neither a test_split nor a validation_split"
    docs = task.eval_docs
    if not len(docs):
        yield f"it has no documents: its split {task.config.test_split or task.config.validation_split!r} is empty"
    if not hasattr(task, "features"):
        return
    with_choices = task.config.doc_to_choice is not None
    if with_choices:
        yield from (f"document 0: {problem}" for problem in _choices(task, docs[0]))
        target, choices = task.doc_to_target(docs[0]), task.doc_to_choice(docs[0])
        if isinstance(target, int) and not _is_choice(target, choices):
            yield f"document 0: {_stray(target, choices)}"


def _wrong_names(task: ConfigurableTask) -> Iterator[str]:
    """Yield what is wrong with the names of metrics and filters."""
    for entry in task.config.metric_list or ():
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or task.config.process_results is not None:
            continue
        allowed = _METRICS.get(task.config.output_type)
        found = getattr(task, "_metric_fn_list", {}).get(name)  # lm-eval also finds those of `evaluate`
        if name not in metric_registry and found is None:
            yield f"metric_list: there is no metric {name!r}; lm-eval has {', '.join(sorted(metric_registry))}"
        elif allowed is not None and name not in allowed:
            yield (
                f"metric_list: {name} is not computed for output_type {task.config.output_type}; choose among "
                f"{', '.join(sorted(allowed))}"
            )
    for pipeline in task.config.filter_list or ():
        steps = pipeline.get("filter") if isinstance(pipeline, dict) else None
        for step in steps if isinstance(steps, list) else ():
            name = step.get("function") if isinstance(step, dict) else step
            if isinstance(name, str) and name not in filter_registry:
                yield f"filter_list: there is no filter {name!r}; lm-eval has {', '.join(sorted(filter_registry))}"


def _choices(task: ConfigurableTask, doc: Any) -> Iterator[str]:
    choices = task.doc_to_choice(doc)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        yield f"doc_to_choice gives {reprlib.repr(choices)}, not a list of texts"
    elif not choices:
        yield "doc_to_choice gives no choices"
    elif "" in choices:
        yield f"its choices {reprlib.repr(choices)} include an empty text; check doc_to_choice"


def check_settings(task: Task, lm: TemplateLM, findings: Findings) -> None:
    """Check what does not depend on documents: metrics, settings of generation, and the number of examples."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        findings.problems.append((name, "it runs code that the model writes, which LightLM does not do"))
    if getattr(task, "MULTIMODAL", False):
        findings.problems.append((name, "it has images or sound, and the model reads only text"))
    if not isinstance(task, ConfigurableTask):
        return
    findings.problems += [(name, problem) for problem in _wrong_names(task)]
    shots = task.config.num_fewshot or 0
    pool = getattr(getattr(task, "sampler", None), "df", None)
    if shots and pool is not None:
        # lm-eval draws one more, to have enough without the document itself; also if the task names neither split.
        itself = task.fewshot_cfg.split == task.config.test_split
        if len(pool) < shots + itself:
            has = f"it has {len(pool):,} example{'s' * (len(pool) != 1)} for its prompts"
            more = f" (it needs {shots + 1:,}, because one may be the document itself)" if itself else ""
            problem = f"{has}, but {shots:,} were asked for{more}; lower --num-fewshot"
            findings.problems.append((name, problem))
    if task.OUTPUT_TYPE == "generate_until":
        try:
            generation = Generation.of(task.config.generation_kwargs or {}, lm.generation_config)
            generation.room(lm.max_length)
        except LightLMError as error:
            findings.problems.append((name, str(error)))
        else:
            places = f"{name}: generation_kwargs", "the model's generation_config.json"
            for place, ignored in zip(places, (generation.ignored, generation.ignored_of_model), strict=True):
                if ignored:
                    findings.notes.append(
                        f"{place}: {', '.join(ignored)} is not supported and ignored; scores of other programs may "
                        "differ for it"
                    )


@contextlib.contextmanager
def _replaced(task: Task, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one task."""
    setattr(task, method, function)
    try:
        yield
    finally:
        delattr(task, method)  # that of its class remains


def build_requests(task: Task, lm: TemplateLM, options: Mapping[str, Any], findings: Findings) -> bool:
    """Build the requests of a task, as lm-eval's `evaluate` does with these options, and return whether that worked.

    A document without a request is a problem: lm-eval would stop at it once everything is scored.
    """
    done, construct = 0, task.construct_requests
    without: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal done
        built = construct(*args, **options)
        if built == []:
            without.append(done)
        done += 1
        return built

    try:
        with _replaced(task, "construct_requests", counting):
            task.build_all_requests(limit=options["limit"], **_prompting(lm, options))
    except Exception as error:
        findings.problems.append((task.task_name, f"document {done}: {reason_of(error)}"))
        return False
    if without:
        why = "doc_to_choice gives no choices" if task.OUTPUT_TYPE == "multiple_choice" else "it asks nothing"
        more = _and_others(len(without) - 1)
        findings.problems.append((task.task_name, f"document {without[0]}: {why}{more}"))
    return not without


def _prompting(lm: TemplateLM, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how to write prompts, as lm-eval's `evaluate` passes it to a task."""
    plain = {"system_instruction": options.get("system_instruction")}
    if not options.get("apply_chat_template"):
        return plain
    return plain | {
        "apply_chat_template": True,
        "fewshot_as_multiturn": options["fewshot_as_multiturn"],
        "chat_template": lm.apply_chat_template,
        "tokenizer_name": lm.tokenizer_name,
    }


@contextlib.contextmanager
def prepared(task: Task) -> Iterator[None]:
    """Context manager in which lm-eval scores the requests that a task has, and its errors name the document."""
    done, process = 0, task.process_results

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal done
        try:
            processed = process(*args, **options)
        except Exception as error:
            numbers = list(dict.fromkeys(instance.doc_id for instance in task.instances))
            number = numbers[done % len(numbers)]  # there is a round per filter
            raise DataError(f"document {number}: {reason_of(error)}") from error
        done += 1
        return processed

    with _replaced(task, "build_all_requests", lambda **_: None), _replaced(task, "process_results", counting):
        yield


def check_requests(task: Task, lm: TemplateLM, findings: Findings) -> float | None:
    """Check every document: choices and target; note answers that the model's context does not hold.

    Returns:
        The accuracy that guessing reaches; None for a task without choices.
    """
    wrong: dict[str, list[tuple[int, str]]] = {}
    chances: list[float] = []
    seen: set[int] = set()
    for instance in task.instances:
        number = instance.doc_id
        if instance.request_type == "loglikelihood":
            answer = instance.args[1]
            if not answer and task.OUTPUT_TYPE != "multiple_choice":
                _add(wrong, "empty", number, "its answer is empty; check doc_to_target")
            # A token covers at least a byte, so only long texts have to be encoded.
            elif len(answer.encode()) > lm.max_length:
                size = len(lm.tok_encode(answer, add_special_tokens=False))
                if size > lm.max_length:
                    _add(
                        wrong, "long", number, f"an answer has {size:,} tokens, but the context holds {lm.max_length:,}"
                    )
        if task.OUTPUT_TYPE == "multiple_choice" and isinstance(task, ConfigurableTask) and number not in seen:
            seen.add(number)
            if problem := next(_choices(task, instance.doc), None):
                _add(wrong, "choices", number, problem)
                continue
            choices = task.doc_to_choice(instance.doc)
            target = task.doc_to_text(instance.doc) if task.multiple_input else task.doc_to_target(instance.doc)
            targets = target if isinstance(target, list) else [target]
            right = [one for one in targets if _is_choice(one, choices)]
            chances.append(len(right) / len(choices))
            if len(right) < len(targets):
                stray = next(one for one in targets if not _is_choice(one, choices))
                _add(wrong, "target", number, _stray(stray, choices))
    for kind, found in wrong.items():
        first, text = found[0]
        others = len(found) - 1
        more = _and_others(others)
        # lm-eval's own tasks run as they are: documents without a right answer are wrong for every model.
        if kind == "target" and _is_stock(task) and others + 1 < len(seen):
            findings.notes.append(f"{task.task_name}: document {first}: {text}{more}; it counts as wrong")
        elif kind == "long":
            findings.notes.append(f"{task.task_name}: document {first}: {text}{more}; it is scored in windows")
        else:
            findings.problems.append((task.task_name, f"document {first}: {text}{more}"))
    return sum(chances) / len(chances) if chances else None


def _and_others(count: int) -> str:
    return f" (and {count:,} other document{'s' * (count != 1)})" if count else ""


def _add(wrong: dict[str, list[tuple[int, str]]], kind: str, number: int, text: str) -> None:
    found = wrong.setdefault(kind, [])
    if not found or found[-1][0] != number:
        found.append((number, text))


def _stray(target: Any, choices: list[str]) -> str:
    last = len(choices) - 1
    return f"the target {target!r} is not one of its {len(choices)} choices (0 to {last}); check doc_to_target"


def _is_choice(target: Any, choices: list[str]) -> bool:
    return target in choices if isinstance(target, str) else 0 <= target < len(choices)


def _is_stock(task: Task) -> bool:
    metadata = task.config.metadata if isinstance(task.config, TaskConfig) else None
    source = (metadata or {}).get("config_source")
    return source is not None and Path(source).is_relative_to(ROOT)
