"""How a task's answers are generated: lm-eval's `generation_kwargs` and, for what they leave open, the model's file."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from lightlm.errors import UsageError
from lightlm.generate.sampling import Sampling

_MAX_NEW_TOKENS = 256  # lm-eval's default if a task sets none
_TOP_K = 50  # that of transformers' `generate`, which lm-eval's `hf` calls
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
# Settings of transformers and vLLM: their name in `Sampling`, and how to read a value.
_FILTERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("temperature", float),
    "top_k": ("top_k", lambda value: int(value) if int(value) > 0 else None),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "typical_p": ("typical_p", float),
}
_ADJUSTMENTS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # which greedy answers follow too
    "repetition_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "no_repeat_ngram_size": ("no_repeat_ngram", int),
    "min_new_tokens": ("min_new_tokens", int),
}
_KNOWN = {"until", "do_sample", "max_gen_toks", "max_length", *_FILTERS, *_ADJUSTMENTS}

# Settings of transformers and vLLM that LightLM lacks, each with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "use_cache": (True, False),
    "skip_special_tokens": (True,),
    "guidance_scale": (1,),
    "renormalize_logits": (True, False),
    "remove_invalid_values": (True, False),
}

# What lm-eval's `hf` follows of a model's generation_config.json: the temperature is always the task's, and
# transformers lacks two of the penalties.
_OF_MODEL = (_FILTERS.keys() | _ADJUSTMENTS.keys()) - {"temperature", "presence_penalty", "frequency_penalty"}
# Its other keys that do not change lm-eval's answers. Ends of text are the tokenizer's.
_WITHOUT_EFFECT = {
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("decoder_start_token_id", "do_sample", "temperature", "max_length", "presence_penalty", "frequency_penalty"),
    *("cache_implementation", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate",),
}


@dataclass(frozen=True)
class Generation:
    """Settings of a task's answers.

    Args:
        stops: an answer ends before the first of these texts. Each may contain special tokens.
        new_tokens: most tokens of an answer; prompts are cut to leave room for them.
        max_length: most tokens of prompt and answer, in place of `new_tokens`; None: no such limit.
        ignored: settings of the task that LightLM does not support, as `num_beams: 4`.
        ignored_of_model: such settings of the model's generation_config.json.
    """

    stops: tuple[str, ...]
    new_tokens: int
    max_length: int | None
    sampling: Sampling
    ignored: tuple[str, ...]
    ignored_of_model: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], of_model: Mapping[str, Any] | None = None) -> "Generation":
        """Read `generation_kwargs`.

        As in transformers, answers are greedy without `do_sample` or a temperature. Otherwise they are drawn from the
        50 likeliest tokens, unless `top_k` says how many; 0 and null are off.

        Args:
            settings: the task's.
            of_model: the model's generation_config.json, for what the task leaves open.

        Raises:
            UsageError: a value has the wrong type or is out of its range.
        """
        left = {key: value for key, value in (of_model or {}).items() if key not in settings and value is not None}
        given = {key: value for key, value in left.items() if key in _OF_MODEL}
        place = "generation_kwargs" + "".join(f", {key} of the model's generation_config.json" for key in given)
        given |= {key: value for key, value in settings.items() if value is not None}
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS))
            stops = kwargs["until"]
            if not all(isinstance(stop, str) for stop in stops):
                raise UsageError(f"until: {stops!r} is not a list of texts")
            max_length = int(kwargs["max_length"]) if "max_length" in kwargs else None
            new_tokens = kwargs["max_gen_toks"]
            if max_length is not None and not any(name in given for name in _LENGTHS):
                new_tokens = 1
            drawn = kwargs.get("do_sample")
            readers = (_FILTERS if drawn else {}) | _ADJUSTMENTS
            values: dict[str, Any] = {"temperature": 0.0}
            if drawn:
                values = {"temperature": 1.0, "top_k": None if "top_k" in settings else _TOP_K, "top_p": 1.0}
            values |= {name: read(kwargs[key]) for key, (name, read) in readers.items() if key in kwargs}
            sampling = Sampling(**values)
        except (TypeError, ValueError, UsageError) as error:
            raise UsageError(f"{place}: {error}") from None
        if new_tokens < 1 or (max_length is not None and max_length < 1):
            raise UsageError("generation_kwargs: an answer must have at least 1 token")
        ignored = _changing(kwargs, _KNOWN)
        ignored_of_model = _changing(left, _OF_MODEL | _WITHOUT_EFFECT)
        return cls(tuple(filter(None, stops)), new_tokens, max_length, sampling, ignored, ignored_of_model)

    def room(self, context: int) -> int:
        """Return the most prompt tokens in a context of this size.

        Raises:
            UsageError: the context does not hold a prompt token beside the answer.
        """
        if self.new_tokens >= context:
            raise UsageError(
                f"it asks for {self.new_tokens:,} new tokens, but the model's context holds only {context:,} with the "
                "prompt; lower max_gen_toks in its generation_kwargs, or use a model with a longer context"
            )
        return context - self.new_tokens

    def limit(self, prompt: int) -> int:
        """Return the most tokens of the answer to a prompt of this length; at least 1."""
        return self.new_tokens if self.max_length is None else max(1, self.max_length - prompt)


def _changing(settings: Mapping[str, Any], known: Set[str]) -> tuple[str, ...]:
    """Return the settings besides these that would change answers, as `num_beams: 4`."""
    others = ((key, value) for key, value in settings.items() if key not in known)
    return tuple(f"{key}: {value}" for key, value in others if value not in _NEUTRAL.get(key, ()))
