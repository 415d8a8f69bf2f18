"""The Python API: what `import lightlm` offers. Each function does what the command of its name does.

import lightlm

lightlm.prepare("pydocs")
result = lightlm.train("demo")
model = lightlm.load(result.run)
print(model.generate("Return a new"))
"""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightlm.checkpoint import RAW_WEIGHTS, LoadedModel
from lightlm.choices import check_weights
from lightlm.convert.load import find_start, load_pretrained
from lightlm.cpu import restored_threads
from lightlm.data.chat.conversation import columns_of
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare as prepare_folder
from lightlm.data.shards import TrainOn
from lightlm.data.sources.registry import open_source
from lightlm.device import pick_device, pick_dtype
from lightlm.errors import UsageError
from lightlm.evaluate.in_training.task_scores import TaskScores
from lightlm.evaluate.results.store import result_file
from lightlm.evaluate.runner import evaluate_model
from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.scoring.score import score
from lightlm.evaluate.settings import Settings, split_list
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.generate.batch import Batch
from lightlm.generate.prompts import PromptReader
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.settings import Settings as AnswerSettings
from lightlm.generate.text_batch import Question, TextBatch
from lightlm.model.config import ModelConfig
from lightlm.names import warn
from lightlm.quantities import parse_quantity
from lightlm.recipe import load_recipe
from lightlm.report.build import renew_report
from lightlm.runs import find_run, locked, new_run
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.observe.observers import Observer, Observers
from lightlm.train.observe.trackers import Trackers
from lightlm.train.setup import open_data, set_up
from lightlm.train.trainer import Result, Trainer

__all__ = ["Model", "Observer", "Result", "TextScore", "evaluate", "load", "prepare", "train"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts one text."""

    log_likelihood: float  # nats, of all tokens
    tokens: int
    text_bytes: int  # UTF-8

    @property
    def nats_per_token(self) -> float:
        """The mean loss; NaN for an empty text."""
        return -self.log_likelihood / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The loss per byte of text, comparable between tokenizers; NaN for an empty text."""
        return -self.log_likelihood / math.log(2) / self.text_bytes if self.text_bytes else math.nan


class Model:
    """A PyTorch model (`transformer`) with its `tokenizer`, and the `path` or Hub id that it was loaded from."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.transformer, self.tokenizer, self.path = loaded.model, loaded.tokenizer, loaded.path
        self._loaded = loaded

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {self.num_parameters:,} parameters)"

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.transformer.config

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied output head counts once."""
        return self.transformer.num_parameters()["total"]

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = DEFAULT.temperature,
        top_k: int | None = None,
        top_p: float = DEFAULT.top_p,
        seed: int = 1337,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Return the prompt's continuation, without the prompt.

        Args:
            prompt: the text to continue; an empty one starts as the model expects, from end-of-text if it is ours.
            max_new_tokens: tokens per continuation; end-of-text ends one earlier.
            temperature: 0 takes the most likely token.
            top_k: draw among the k most likely tokens; None is all.
            top_p: draw among the fewest tokens of this total probability.
            seed: the same seed gives the same text.
            stop: a text that ends the continuation and is not part of it, or several.

        Raises:
            UsageError: a setting is out of its range.
            LightLMError: the prompt is longer than the model's context.
        """
        return self.samples(prompt, 1, max_new_tokens, Sampling(temperature, top_k, top_p), seed, stop)[0]

    def samples(
        self,
        prompt: str,
        count: int,
        max_new_tokens: int = 200,
        sampling: Sampling = DEFAULT,
        seed: int = 1337,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """Return `count` different continuations of one prompt, which is read once. See `generate`."""
        if count < 1:
            raise UsageError(f"count must be at least 1, is {count}")
        settings = AnswerSettings(sampling, max_new_tokens, seed, (stop,) if isinstance(stop, str) else tuple(stop))
        ids = PromptReader(self.tokenizer, self.config.max_seq_len).read(prompt, max_new_tokens)
        return self._answers(ids, count, settings)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        max_new_tokens: int = 200,
        sampling: Sampling = DEFAULT,
        seed: int = 1337,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Return the answer to a conversation, written with the model's chat template.

        Args:
            messages: such as `[{"role": "user", "content": "Hello"}]`.
            max_new_tokens, sampling, seed, stop: see `generate`.

        Raises:
            UsageError: the model has no chat template, a message is malformed, or a setting is out of its range.
            LightLMError: the conversation is longer than the model's context, or the template refuses it.
        """
        settings = AnswerSettings(sampling, max_new_tokens, seed, (stop,) if isinstance(stop, str) else tuple(stop))
        ids = PromptReader(self.tokenizer, self.config.max_seq_len).read_chat(messages, max_new_tokens)
        return self._answers(ids, 1, settings)[0]

    def _answers(self, ids: list[int], count: int, settings: AnswerSettings) -> list[str]:
        batch = TextBatch(Batch(self.transformer, count, vocab_size=self.tokenizer.vocab_size), self.tokenizer)
        handles = batch.join([Question(ids, settings, number) for number in range(count)])
        answers: dict[int, str] = {}
        while batch:
            answers |= {piece.handle: piece.answer.text for piece in batch.step() if piece.answer is not None}
        return [answers[handle] for handle in handles]

    @torch.no_grad()
    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Return the float32 logits of shape (T, V): row t predicts the token after token t.

        Args:
            text: a text, or T token ids (at least one, at most `config.max_seq_len`).

        Raises:
            UsageError: there are no tokens, more than the model's context holds, or an id outside its vocabulary.
        """
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not 1 <= len(ids) <= self.config.max_seq_len:
            raise UsageError(f"logits needs 1 to {self.config.max_seq_len:,} tokens, got {len(ids):,}")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise UsageError(f"logits needs ids from 0 to {self.config.vocab_size - 1:,}, got {min(ids)} to {max(ids)}")
        logits_BTV: Tensor = self.transformer(torch.tensor([ids], device=self.transformer.device))
        return logits_BTV[0].float()

    def score(self, texts: Sequence[str], batch_size: int | str = "auto") -> list[TextScore]:
        """Return how well the model predicts each text, as `lightlm eval --tasks heldout` scores documents.

        The first token follows end-of-text (an imported model: its beginning-of-text token). A text longer than the
        context is scored in consecutive windows; the last one sees as many tokens before it as the context holds.
        """
        if isinstance(texts, str):
            raise UsageError("score takes a list of texts; for one text write score([text])")
        start, before = self.tokenizer.start_id, self.tokenizer.context_ids
        length = self.config.max_seq_len
        windows, owners = [], []
        encoded = [[start, *before, *self.tokenizer.encode(text)] for text in texts]
        for owner, ids in enumerate(encoded):
            for first in range(1, len(ids), length):
                end = min(first + length, len(ids))
                windows.append((ids[max(end - 1 - length, 0) : first], ids[first:end]))
                owners.append(owner)
        limits = BatchSize.of(batch_size, self.transformer.device, self.config)
        totals = [0.0] * len(texts)
        for owner, result in zip(owners, score(self.transformer, windows, limits, lambda _: None), strict=True):
            totals[owner] += result.log_likelihood
        facts = zip(totals, encoded, texts, strict=True)
        return [TextScore(total, len(ids) - 1, len(text.encode())) for total, ids, text in facts]


def load(
    model: PathLike | None = None, *, device: str = "auto", dtype: str = "float32", weights: str | None = None
) -> Model:
    """Load a model.

    Args:
        model: a run folder or a run's name, a checkpoint folder, a Hugging Face folder, or a Hub id; None is the
            newest run's newest checkpoint.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (bfloat16 where it is fast).
        weights: `ema` or `raw`, the average or the last weights of a run with `train.ema`; None is the average if any.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConvertError: a Hugging Face model that LightLM cannot represent.
    """
    check_weights(weights)
    target = pick_device(device)
    name = None if model is None else str(model)
    return Model(load_pretrained(name, target, pick_dtype(dtype, target), weights))


def prepare(
    source: PathLike,
    *,
    out: PathLike | None = None,
    tokenizer: str | None = None,
    max_tokens: int | str | None = None,
    val_fraction: float | None = None,
    text_column: str = "text",
    format: Literal["text", "chat", "messages", "sharegpt", "prompt", "alpaca"] = "text",
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
    overwrite: bool = False,
) -> DataFolder:
    """Tokenize a source into a data folder and open it. A folder with the same settings is only opened.

    Args:
        source: `pydocs`, a named data set, `hf:org/name`, a file or a folder, as for `lightlm prepare-data`.
        out: the folder to write; None is `data/NAME`.
        tokenizer: `train:N`, `gpt2`, a model (a run, a folder or a Hub id) or a tokenizer.json; None is the source's
            default.
        max_tokens: stop after the document that reaches this many tokens; text such as "1B" also works.
        val_fraction: share of documents for validation; None is the source's default.
        text_column: the column or JSON key with the text, or with the messages of a conversation.
        format: texts, or conversations: in whichever form a record has (`chat`), or in one of the four.
        train_on: the tokens of a conversation that a model learns to write: `all`, `assistant` or `last`.
        chat_template: a template in Jinja; None is the tokenizer's, else ChatML.
        overwrite: replace a folder that was prepared with other settings.

    Raises:
        UsageError: an argument is out of its range.
        DataError: the source cannot be read, or `out` holds something else.
    """
    text_column = columns_of(format, text_column, train_on)
    opened = open_source(str(source), text_column)
    folder = Path("data") / opened.name if out is None else Path(out)
    limit = None if max_tokens is None else parse_quantity(max_tokens)
    settings: dict[str, Any] = {"max_tokens": limit, "val_fraction": val_fraction, "overwrite": overwrite}
    settings |= {"train_on": train_on, "chat_template": chat_template}
    prepare_folder(opened, tokenizer, folder, text_column=text_column, **settings)
    return DataFolder.open(folder)


def train(
    recipe: PathLike | None = None,
    *overrides: str,
    name: str | None = None,
    resume: PathLike | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Result:
    """Train a model in this process, to the end of the recipe or until Ctrl-C; both save the last step.

    On a CPU, torch computes with the run's `train.threads` meanwhile; afterwards its number of threads is restored.

    Args:
        recipe: a recipe file, or the name of a shipped recipe such as `demo`.
        overrides: changes such as `"optimizer.lr=1e-3"`.
        name: the run folder under `runs/`; None is the recipe's name, with a number if it is taken.
        resume: a run to resume, in place of a recipe.
        overwrite: delete the run of this name first, once recipe and data are known to fit.
        observer: receives every step, sample and checkpoint; None shows nothing.

    Returns:
        The run folder, its last step, losses and duration. `load(result.run)` loads the trained model.

    Raises:
        UsageError: both or neither of `recipe` and `resume`, or `resume` and `overwrite`.
        CheckpointError: the run is being trained, its name is taken, or it has no undamaged checkpoint.
        RecipeError: mistakes in the recipe; the message lists them all.
        DataError: the data is missing or does not fit the recipe.
        TrainingDivergedError: the loss or the gradient became NaN or infinite.
    """
    if (recipe is None) == (resume is None):
        raise UsageError("train takes a recipe, or resume=RUN")
    if resume is not None and overwrite:
        raise UsageError("overwrite=True deletes the run that resume=RUN continues; choose one of them")
    observer = observer or Observer()
    with contextlib.ExitStack() as held:
        held.enter_context(restored_threads())  # a run sets `train.threads`
        run = checkpoint = None
        if resume is not None:
            run = find_run(os.fspath(resume))
            held.enter_context(locked(run))
            parsed, run, checkpoint = reopen_run(run, overrides, observer.note)
        else:
            parsed = load_recipe(str(recipe), overrides, observer.note, find_start)
        data = open_data(parsed, resumed=run)
        assert data is not None
        setup = set_up(parsed, data, observer.note, resume_from=checkpoint)
        evaluator = None
        if parsed.eval.tasks:
            assert setup.tokenizer is not None
            evaluator = TaskScores(setup.recipe.eval, data.main, setup.tokenizer, setup.world, observer.note)
        if run is None:
            exact = name is not None
            run = held.enter_context(new_run(name or parsed.name, exact=exact, overwrite=overwrite))
        with Trackers(parsed.tracking, observer.note) as trackers:
            trainer = Trainer(setup, run, Observers(observer, trackers), evaluator=evaluator)
            result = trainer.train()
        try:
            renew_report(run)
        except Exception as error:  # the run is saved already
            observer.note(f"no plots were made ({error})")
    return result


def evaluate(
    model: PathLike | Model | None = None,
    tasks: str | Sequence[str] = "heldout",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    data: PathLike | None = None,
    data_dir: PathLike | None = None,
    include_path: PathLike | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> dict[str, Any]:
    """Score a model with lm-evaluation-harness; a run keeps the results in its folder `eval/`.

    Args:
        model: what `load` takes, or a loaded model, which keeps its device and precision.
        tasks: lm-eval's tasks, groups or globs, `heldout`, and `open_slm`; a list, or text separated by commas.
        limit: documents per task; None is all.
        num_fewshot: examples in the prompt; None is each task's default.
        batch_size: sequences in a batch, or `auto`.
        data: data folder of heldout; None is the folder that the run was trained on.
        data_dir: a folder with data sets, laid out like the Hub.
        include_path: a folder with further lm-eval tasks.
        apply_chat_template: write prompts as conversations, with the model's chat template.
        system_instruction: what prompts begin with; with a chat template, the system's message.

    Returns:
        The model's facts and `results`: a list with task, metric, value and standard error, as `lightlm eval --json`
        prints them. `failed` has the reasons of tasks without results, which are also logged as warnings.

    Raises:
        UsageError: a task, a folder or the model's chat template does not exist, or `limit` is below 1.
        DataError: some tasks cannot be scored, found before any is (the message lists all of them); or all failed.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, is {limit}; leave it out to score all documents")
    names = split_list(tasks) if isinstance(tasks, str) else list(tasks)
    own, further, sets = (None if folder is None else str(folder) for folder in (data, include_path, data_dir))
    settings = Settings(
        names,
        limit,
        num_fewshot,
        own,
        further,
        sets,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
    )
    chosen = Tasks(settings)
    if isinstance(model, Model):
        chosen = Tasks(_settings_of(model._loaded, chosen))
    chosen.require_data()
    loaded = (model if isinstance(model, Model) else load(model, device=device, dtype=chosen.dtype))._loaded
    done = evaluate_model(
        loaded, chosen, loaded.name, lambda settings: result_file(loaded, settings, None), batch_size=str(batch_size)
    )
    if done.interruption is not None:
        raise done.interruption
    for problem in done.problems:
        warn(problem)
    return done.to_dict()


def _settings_of(loaded: LoadedModel, tasks: Tasks) -> Settings:
    """Return the settings with which `lightlm eval` would score a loaded model, for the name of its results."""
    weight = loaded.model.embed_tokens.weight
    usual = weight.dtype == pick_dtype(tasks.dtype, weight.device)
    dtype = tasks.settings.dtype if usual else str(weight.dtype).removeprefix("torch.")
    raw = any(file.name == RAW_WEIGHTS for file in loaded.weights)
    return replace(tasks.settings, dtype=dtype, chosen_weights="raw" if raw else tasks.settings.chosen_weights)
