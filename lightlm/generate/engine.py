"""Text from a model: continue prompts, all in one batch."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from lightlm.data.tokenizer import Tokenizer
from lightlm.generate.batch import Batch, FinishReason, Request
from lightlm.generate.prompts import encode_chat, encode_prompt
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.sampling.draw import LogProbs
from lightlm.generate.text import text_of
from lightlm.model.transformer import Transformer


@dataclass
class Completion:
    """The new tokens of one row, without the stop token, and why it ended."""

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    log_probs: list[LogProbs] = field(default_factory=list)  # one for each of `ids`, if asked for


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 1337,
    stop_ids: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
    num_samples: int = 1,
    vocab_size: int | None = None,
    logprobs: int = 0,
    fast: bool = True,
) -> list[Completion]:
    """Continue every prompt; the prompts may differ in length.

    Args:
        prompts: token ids, at least one per prompt.
        seed: row b draws from its own generator, seeded with (seed, b); more samples of one prompt keep the first ones.
        stop_ids: tokens that end a row, usually end-of-text.
        on_token: called as on_token(row, token) for each new token; a true answer ends the row.
        num_samples: continuations of each prompt, which is read once.
        vocab_size: the tokenizer's; ids at or above it are never drawn. None allows all ids of the model.
        logprobs: of how many most likely tokens the log-probability is returned at each position; 0 returns none.
        fast: see `Batch`.

    Returns:
        One completion per row: all samples of the first prompt, then those of the next.

    Raises:
        LightLMError: a prompt is empty or longer than the model's context.
        UsageError: max_new_tokens is below 1 or min_new_tokens, or `sampling` names an id that does not exist.
    """
    if not prompts:
        return []
    requests = [
        Request(prompt, max_new_tokens, sampling, seed, index * num_samples + number, stop_ids, logprobs)
        for index, prompt in enumerate(prompts)
        for number in range(num_samples)
    ]
    batch = Batch(model, len(requests), vocab_size=vocab_size, fast=fast)
    completions = dict(zip(batch.join(requests), (Completion() for _ in requests), strict=True))
    rows = {handle: row for row, handle in enumerate(completions)}
    while batch:
        for token in batch.step():
            completion = completions[token.handle]
            if token.finish_reason is not None:
                completion.finish_reason = token.finish_reason
            if token.finish_reason == "stop":
                continue
            completion.ids.append(token.id)
            if token.log_probs is not None:
                completion.log_probs.append(token.log_probs)
            if on_token is not None and on_token(rows[token.handle], token.id):
                completion.finish_reason = "stop"
                batch.leave(token.handle)
    return list(completions.values())


def sample_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    sampling: Sampling = DEFAULT,
    *,
    chat: bool = False,
) -> str:
    """Return the prompt's continuation as text, to look at a model in training.

    With `chat` it is the answer to a message, with an ellipsis where the model did not end it. An empty prompt starts
    from end-of-text. Torch's global generators stay untouched, and the model returns to the mode (training or
    evaluation) it was in. Errors are those of `generate`.
    """
    message = [{"role": "user", "content": prompt}]
    ids = encode_chat(tokenizer, message)[1] if chat else encode_prompt(tokenizer, prompt)
    was_training = model.training
    model.eval()
    try:
        ends, size = tokenizer.end_ids, tokenizer.vocab_size
        # A prepared copy of the weights would take memory from training, and is stale after its next step.
        [completion] = generate(model, [ids], max_new_tokens, sampling, seed, ends, vocab_size=size, fast=False)
    finally:
        model.train(was_training)
    text = text_of(tokenizer, ids, completion.ids)
    return f"{text} …" if chat and completion.finish_reason != "stop" else text
