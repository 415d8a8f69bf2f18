"""Guess with a model's own head of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.3).

The head takes the states that the model has computed anyway, so a guess costs one block and the output head. It keeps
keys and values of the columns whose next token is known.

Shapes: T columns, D hidden size.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightlm.checkpoint import MTP, LoadedModel, build_model, has_mtp, is_checkpoint, load_weights
from lightlm.errors import LightLMError
from lightlm.generate.sampling.draw import Row, copy_of, sample
from lightlm.generate.step.fast import forward_of
from lightlm.generate.step.measured import speed_facts
from lightlm.model.attention import build_mask
from lightlm.model.decoding.cache import KVCache
from lightlm.model.rotary import rotary_table
from lightlm.model.transformer import MTPHead, Transformer


class OwnDraft:
    """Guess the token after the next one with the first head of a model; it has at least one.

    Args:
        model: in evaluation mode. Its output head is that of `decoding`.
        decoding: the model that decodes, with the same weights.
        vocab_size: the tokenizer's size.
    """

    def __init__(self, model: Transformer, decoding: Transformer, vocab_size: int) -> None:
        [head, *_] = model.mtp
        assert isinstance(head, MTPHead)
        self._model, self._head, self._vocab_size = model, head, vocab_size
        self._output = forward_of(decoding)
        self._one_layer = replace(model.config, num_layers=1, layer_sharing=1, first_k_dense=0)
        self.facts = ["mtp", *speed_facts(decoding)]
        self._row: Row | None = None
        self._first = 0  # the position of the first column that the cache holds
        self._cache = self._new_cache(1)
        self._states: list[Tensor] = []  # of columns that the cache does not hold yet

    def _new_cache(self, slots: int) -> KVCache:
        return KVCache(self._one_layer, 1, slots, device=self._model.device, dtype=self._table.dtype)

    @property
    def _table(self) -> Tensor:
        return self._model.embed_tokens.weight

    @property
    def _known(self) -> int:
        """The position after the last column whose states are here."""
        return self._first + self._cache.lengths[0] + sum(map(len, self._states))

    def follow(self, row: Row, position: int, states_TD: Tensor) -> None:
        """Take the model's final states of a row's columns from `position` on.

        Columns that do not follow those before begin anew: then guesses know less, and may be worse.
        """
        if row is not self._row or position != self._known:
            self._row, self._first, self._states = row, position, []
            self._cache.cut(0, 0)
        self._states.append(states_TD.clone())

    @torch.no_grad()
    def guess(self, row: Row, count: int) -> list[int]:
        """Return the token that the head expects after the row's last one; none if the row's states are not here."""
        ids = [*row.prompt, *row.new]
        if row is not self._row or not self._states or self._known != len(ids) - 1:
            return []
        states_TD, self._states = torch.cat(self._states).to(self._table.dtype), []
        begin = self._first + self._cache.lengths[0]
        x_1D = self._run(states_TD, torch.tensor(ids[begin + 1 :], device=states_TD.device), begin)
        return sample(self._output.head(x_1D), [copy_of(row)], self._vocab_size)

    def _run(self, states_TD: Tensor, next_T: Tensor, begin: int) -> Tensor:
        """Append columns to the cache and return the head's state of the last one (1, D)."""
        config, model = self._model.config, self._model
        places = self._cache.lengths[0] + len(states_TD)
        if places > self._cache.max_len:
            self._cache.reserve(1, min(max(places, self._cache.max_len * 3 // 2), config.max_seq_len))
        embedding_TD = F.embedding(next_T, self._table) * config.embedding_scale
        rotation = None
        step = self._cache.begin(1, len(states_TD), None)
        if config.position == "learned":
            after_T = (torch.arange(len(states_TD), device=next_T.device) + begin + 1).clamp(max=config.max_seq_len - 1)
            embedding_TD = embedding_TD + model.embed_positions(after_T)
        else:
            cos, sin = rotary_table(step.positions_BT, config)
            rotation = cos[:, None], sin[:, None]
        mask = build_mask(
            step.positions_BT, step.end, config.window(config.depth), fresh=places == len(states_TD), aligned=True
        )
        x_1TD, _ = self._head(
            states_TD[None],
            embedding_TD[None],
            rotation,
            mask,
            extend=lambda k, v: self._cache.update(step, 0, k, v),
        )
        self._cache.commit(step)
        return x_1TD[0, -1:]


def own_draft_of(loaded: LoadedModel) -> OwnDraft:
    """Return a loaded model's first head of multi-token prediction as its draft.

    Raises:
        LightLMError: it has none.
    """
    if not is_checkpoint(loaded.path) or not has_mtp(loaded.path):
        raise LightLMError(
            f"{loaded.name} has no heads of multi-token prediction: checkpoints of a run with train.mtp have them, and "
            "no other format"
        )
    model = loaded.model
    like = model.embed_tokens.weight
    heads = load_weights(loaded.path, loaded.weights[0].name)
    state = model.state_dict() | {
        name: tensor.to(like) if not name.endswith("selection_bias") else tensor.to(like.device)
        for name, tensor in heads.items()
        if name.startswith(MTP)
    }
    return OwnDraft(build_model(model.config, state, str(loaded.path)).eval(), model, loaded.tokenizer.vocab_size)
