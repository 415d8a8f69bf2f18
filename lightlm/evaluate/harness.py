"""The model `lightlm` for lm-evaluation-harness, without transformers.

`lightlm eval` uses it. lm-eval 0.4 cannot find models of other packages by itself (it fills its registry only from a
table in lm_eval/models/__init__.py), so its own command runs as

    python -m lightlm.evaluate run --model lightlm --model_args pretrained=runs/demo --tasks hellaswag

with all of its arguments. In Python, import `lightlm.evaluate.harness` before calling `lm_eval.simple_evaluate`.
"""

import contextlib
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightlm.checkpoint import LoadedModel
from lightlm.convert.load import load_pretrained
from lightlm.data.chat.template import ChatTemplate
from lightlm.device import pick_device, pick_dtype
from lightlm.errors import LightLMError, UsageError
from lightlm.evaluate.generation import Generation
from lightlm.evaluate.results.truncation import Truncation
from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.scoring.score import answer_windows, score
from lightlm.generate.engine import generate
from lightlm.generate.text import TextStream
from lightlm.names import warn

_SEED = 1234  # lm-eval's default torch seed
_LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


class _Lines:
    """Progress where no bar can be drawn, such as a log file: a line on standard error each minute."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._began = self._printed = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS and self._done:
            self._printed = now
            left = (now - self._began) * (self._total / self._done - 1)
            share = f"{self._done:,} of {self._total:,} ({self._done / self._total:.0%})"
            print(f"{self._name}: {share}, about {math.ceil(left / 60)} min left", file=sys.stderr, flush=True)


@register_model("lightlm")
class LightLM(TemplateLM):
    """A model for lm-eval.

    Args:
        pretrained: a run, checkpoint, Hugging Face folder or Hub id, None for the newest run, or a loaded model.
        device: `auto` or a torch device; unused with a loaded model.
        dtype: precision of the weights; `auto` is bfloat16 where it is fast, else float32. Unused with a loaded model.
            Logits and log-probabilities are float32 in either case; in bfloat16 they would lower scores (llm.c's
            dev/eval, lm-eval's `hf`). SmolLM2-135M-Instruct on HellaSwag's first 1,000 documents: acc 35.4, acc_norm
            43.1 in float32, and 35.3, 42.9 in bfloat16. Use float32 for scores that do not depend on the machine.
        add_bos_token: whether the beginning-of-text token precedes every context. None follows the tokenizer of an
            imported model, and adds no token for LightLM's own models. As in lm-eval's `hf`.
        batch_size: sequences per batch, or `auto` for a number of positions that suits the device.
        show_progress: draw bars on a terminal, and else print a line each minute; leave out beside another display.

    Raises:
        LightLMError: the model cannot be loaded.
        UsageError: batch_size is neither a number nor `auto`.
    """

    fast_decoding = True  # see `Batch`

    def __init__(
        self,
        pretrained: str | LoadedModel | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
        show_progress: bool = True,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        self._show_progress = show_progress
        self._task, self._truncation = "", Truncation()
        self._in_conversations = False  # whether prompts are; their special tokens are then tokens
        self._left_out_system = False
        if not isinstance(pretrained, LoadedModel):
            target = pick_device(device)
            pretrained = load_pretrained(pretrained, target, pick_dtype(dtype, target))
        self.loaded = pretrained
        self.model = pretrained.model.eval()
        self._device = self.model.device
        self.limits = BatchSize.of(batch_size, self._device, self.model.config)
        tokenizer = self.loaded.tokenizer
        self.prefix_ids: list[int] = []  # before every context
        if tokenizer.adds_bos if add_bos_token is None else add_bos_token:
            self.prefix_ids = tokenizer.context_ids or [self.prefix_token_id]

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one; see `Tokenizer.start_id`."""
        return self.loaded.tokenizer.start_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The model's generation_config.json, whose settings answers follow as far as a task leaves them open."""
        return self.loaded.tokenizer.generation_config

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the string's token ids, after `prefix_ids` unless `add_special_tokens` is False.

        Once a chat template was applied, the characters of special tokens mean these, as they always do in lm-eval's
        `hf`, and nothing precedes a text that begins with `prefix_ids`.
        """
        tokenizer, before = self.loaded.tokenizer, self.prefix_ids
        ids = tokenizer.encode_special(string) if self._in_conversations else tokenizer.encode(string)
        if add_special_tokens is False or (self._in_conversations and ids[: len(before)] == before):
            return ids
        return [*before, *ids]

    @property
    def tokenizer_name(self) -> str:
        """The model's path as part of a file name, for lm-eval's cache of requests."""
        return re.sub(r"[^\w.-]+", "__", str(self.loaded.path))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the model's chat template, which lm-eval writes into its results; None for False.

        Raises:
            UsageError: the model has none, or another one than the default is named.
        """
        if isinstance(chat_template, str) and chat_template != "default":
            raise UsageError(f"the chat template {chat_template!r} cannot be chosen; the model's default is applied")
        if not chat_template:
            return None
        self.require_chat_template()
        return str(self.loaded.tokenizer.settings["chat_template"])

    def require_chat_template(self, system_instruction: str | None = None) -> None:
        """Raise UsageError if the model has no chat template, or one that refuses the system's message."""
        if self.loaded.tokenizer.settings.get("chat_template") is None:
            raise UsageError(
                f"{self.loaded.name} has no chat template, because it was not trained on conversations; leave out "
                "--apply-chat-template"
            )
        template, question = ChatTemplate.of(self.loaded.tokenizer), {"role": "user", "content": "Hello"}
        template.render([question])
        if system_instruction is None:
            return
        try:
            template.render([{"role": "system", "content": system_instruction}, question])
        except LightLMError as error:
            raise UsageError(f"{self.loaded.name}: {error}; leave out --system-instruction") from error

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's chat template writes it.

        As in lm-eval's `hf`, a template that refuses it gets it without the system's message, such as a task's
        description.

        Args:
            add_generation_prompt: whether the beginning of an answer follows; else the last message is continued.

        Raises:
            LightLMError: the model has no chat template, or the template refuses the messages.
        """
        self._in_conversations = True
        template = ChatTemplate.of(self.loaded.tokenizer)
        write = template.render if add_generation_prompt else template.render_begun
        try:
            return write(chat_history)
        except LightLMError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            text = write(others)
        if not self._left_out_system:
            warn("the model's chat template refuses system messages, so the tasks' descriptions are left out")
        self._left_out_system = True
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score_answers([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return scores

    def loglikelihood_apart(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, int]]:
        """Return each answer's log-likelihood and number of tokens.

        Context and answer are encoded apart and without special tokens, as ArithMark-3 asks (see
        lightlm/evaluate/tasks/arithmark.py). lm-eval's `loglikelihood` encodes them together.
        """
        encode = partial(self.tok_encode, add_special_tokens=False)
        pairs = [(encode(context), encode(answer)) for context, answer in (request.args for request in requests)]
        scores = self._score_answers(pairs)
        return [(nats, len(answer)) for (nats, _), (_, answer) in zip(scores, pairs, strict=True)]

    def _score_answers(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score token ids of (context, answer), and count the contexts whose beginning does not fit.

        An answer that is longer than the model's context is scored in windows; see `answer_windows`.
        """
        windows = [answer_windows(context, answer, self.max_length) for context, answer in pairs]
        room = self.max_length + 1  # the last token is only predicted
        self._truncation += Truncation.of(sum(map(len, first)) - room for first, *_ in windows)
        scores = iter(self._score([window for group in windows for window in group], "scoring answers"))
        found = []
        for group in windows:
            parts = list(itertools.islice(scores, len(group)))
            found.append((sum(nats for nats, _ in parts), all(greedy for _, greedy in parts)))
        return found

    @contextlib.contextmanager
    def _bar(self, total: int, description: str) -> Iterator[Callable[[int], None]]:
        """Context manager that gives the function to advance a bar on standard error; without a terminal, lines."""
        console = Console(stderr=True)
        if self._show_progress and not console.is_terminal:
            lines = _Lines(f"{self._task}{description}", total)
            yield lines.advance
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True, disable=not self._show_progress) as progress:
            task = progress.add_task(f"{self._task}{description}", total=total)
            yield lambda count: progress.advance(task, count)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return each document's log-likelihood after end-of-text, in windows of the context's size without overlap."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = [*self.prefix_ids, *self.loaded.tokenizer.encode(request.args[0])]  # a document, not a prompt
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, pairs)
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score(windows, "reading documents"), strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, pairs: list[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        with self._bar(len(pairs), what) as advance:
            scores = score(self.model, pairs, self.limits, advance)
        return [(result.log_likelihood, result.greedy) for result in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return continuations up to their first stop string; requests with equal settings are batched by length."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(prompts[i])))
        texts, limits = [""] * len(requests), self.limits.for_decoding()
        with self._bar(len(requests), "generating") as advance:
            while order:
                settings = requests[order[0]].args[1]
                generation = Generation.of(settings, self.generation_config)
                length = len(prompts[order[0]]) + generation.limit(len(prompts[order[0]]))
                count = 1
                while count < len(order) and requests[order[count]].args[1] == settings:
                    if not limits.fits(count + 1, length):
                        break
                    count += 1
                batch, order = order[:count], order[count:]
                answers = self._generate([prompts[i] for i in batch], generation, seed=_SEED + len(order))
                for i, text in zip(batch, answers, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                advance(count)
        return texts

    def _generate(self, prompts: list[list[int]], generation: Generation, seed: int) -> list[str]:
        tokenizer, room = self.loaded.tokenizer, generation.room(self.max_length)
        self._truncation += Truncation.of(len(prompt) - room for prompt in prompts)
        starts = [prompt[-room:] or [self.prefix_token_id] for prompt in prompts]
        most = [generation.limit(len(start)) for start in starts]
        stops = [*generation.stops, tokenizer.end_of_text]
        streams = [TextStream(tokenizer) for _ in prompts]
        # As in lm-eval's `hf`, special tokens count for stop strings and are left out of the answer.
        texts, seen, counts = [""] * len(prompts), [""] * len(prompts), [0] * len(prompts)

        def ends(row: int, token: int) -> bool:
            piece = streams[row].push(token)
            texts[row] += piece
            seen[row] += tokenizer.special_tokens.get(token, piece)
            counts[row] += 1
            return counts[row] == most[row] or any(stop in seen[row] for stop in stops)

        generate(
            self.model,
            starts,
            max(most),
            generation.sampling,
            seed,
            tokenizer.end_ids,
            ends,
            vocab_size=tokenizer.vocab_size,
            fast=self.fast_decoding,
        )
        return [
            postprocess_generated_text(text + stream.flush(), stops, None)
            for text, stream in zip(texts, streams, strict=True)
        ]

    def begin(self, task: str) -> None:
        """Name the task of the requests that follow in the bars, and count their cut beginnings anew."""
        self._task, self._truncation = f"{task}: ", Truncation()

    @property
    def truncation(self) -> Truncation:
        """How the requests since `begin` were cut."""
        return self._truncation

    def describe_bos(self, setting: str) -> dict[str, Any]:
        """Return the tokens before every context, and before a text without context, for the facts of a result."""
        ids = [*self.prefix_ids, self.prefix_token_id]
        *before, without = ({"id": token, "token": self.loaded.tokenizer.name_of(token)} for token in ids)
        return {"setting": setting, "before_contexts": before, "without_context": without}

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results about the model."""
        return {
            "model_num_parameters": self.model.num_parameters()["total"],
            "model_dtype": str(self.model.embed_tokens.weight.dtype),
            "model_revision": "",
            "model_sha": "",
        }
