"""What a run evaluates between two steps: the validation loss, samples, and the scores of `eval.tasks`."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from lightlm import checkpoint, files
from lightlm.data.loader import holds_targets
from lightlm.generate.engine import sample_text
from lightlm.model.transformer import Transformer
from lightlm.train.distributed import PeerLostError
from lightlm.train.observe.observers import Finished, Observer
from lightlm.train.rng import preserved
from lightlm.train.setup import Setup
from lightlm.train.validation import validate

Sampler = Callable[[Transformer, str], str]
Evaluator = Callable[[Transformer, Path, threading.Event, Finished], dict[str, float] | None]


class Evaluations:
    """Evaluates a run's model as it is. All processes call the same methods together.

    Args:
        setup: the parts of the run, with data.
        run: the run folder.
        observer: receives the events; one that does nothing in a process that does not write.
        sampler, evaluator: as in `Trainer`.
    """

    def __init__(
        self, setup: Setup, run: Path, observer: Observer, sampler: Sampler | None, evaluator: Evaluator | None
    ) -> None:
        assert setup.data is not None
        assert setup.tokenizer is not None
        self._setup, self._run, self._observer = setup, run, observer
        self._recipe, self._world, self._tokenizer = setup.recipe, setup.world, setup.tokenizer
        self._sampler, self._evaluator = sampler or self._continue, evaluator
        seq_len, too_long = self._recipe.seq_len, self._recipe.data.too_long
        streams = setup.data.streams("val")
        self._streams = {name: each for name, each in streams.items() if holds_targets(each, seq_len, too_long)}
        self._chat = setup.data.chat is not None  # prompts are messages
        self._token_bytes = torch.from_numpy(setup.tokenizer.token_bytes())

    def losses(self, stop: threading.Event, phase: str = "validating") -> dict[str, float] | None:
        """Return the metrics of `validate`, or None after a signal; without validation data there are none.

        Args:
            phase: what the observer shows.
        """
        if self._stopped(stop):
            return None
        if not self._streams:
            return {}
        with self._observer.during(phase) as finished:
            return validate(
                self._setup.loss,
                self._streams,
                self._setup.last_shares,
                self._token_bytes,
                seq_len=self._recipe.seq_len,
                max_tokens=self._recipe.eval.tokens,
                batch_size=self._setup.gradients.micro_batch,
                stopped=lambda: self._stopped(stop),
                finished=finished,
                too_long=self._recipe.data.too_long,
            )

    def scores(self, stop: threading.Event, step: int) -> dict[str, float] | None:
        """Return the scores of `eval.tasks`, or None after a signal.

        Any error of a task becomes a note, so that training continues.
        """
        if self._evaluator is None:
            return {}
        model, tasks = self._setup.loss.whole_model(), self._recipe.eval.tasks
        path = self._run / "checkpoints" / checkpoint.step_name(step)
        try:
            with self._observer.during(f"scoring {', '.join(tasks)}") as finished, preserved(model):
                scores = self._evaluator(model, path, stop, finished)
        except PeerLostError:
            raise
        except Exception as error:
            self._observer.note(f"eval.tasks could not be scored at step {step}: {error}")
            return {}
        return None if scores is None else {f"eval/{task}": value for task, value in scores.items()}

    def samples(self, stop: threading.Event, step: int) -> None:
        """Let the model continue the recipe's prompts, or answer them as messages.

        An error, such as one of memory, becomes a note.
        """
        if not self._recipe.eval.prompts:
            return
        model = self._setup.loss.whole_model()
        if not self._world.is_writer:
            return
        texts = []
        try:
            with self._observer.during("sampling"):
                for prompt in self._recipe.eval.prompts:
                    if stop.is_set():
                        return
                    text = self._sampler(model, prompt)
                    shown = f"user: {prompt}\nassistant: " if self._chat else prompt
                    texts.append(shown + text)
                    self._observer.sample(step, shown, text)
        except Exception as error:
            self._observer.note(f"eval.prompts could not be continued at step {step}: {error}")
            return
        samples = self._run / "samples" / f"{checkpoint.step_name(step)}.txt"
        samples.parent.mkdir(exist_ok=True)
        files.write_text(samples, "\n\n---\n\n".join(texts) + "\n")

    def _continue(self, model: Transformer, prompt: str) -> str:
        most, seed = self._recipe.eval.max_new_tokens, self._recipe.train.seed
        return sample_text(model, self._tokenizer, prompt, most, seed, chat=self._chat)

    def _stopped(self, stop: threading.Event) -> bool:
        """Return whether a signal to any process asks all to stop; all processes call this together."""
        return self._world.any(stop.is_set() or self._world.abandoned)[0]
