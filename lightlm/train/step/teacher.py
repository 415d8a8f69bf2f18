"""The teacher of a run that learns from a larger model: frozen, and in the precision of inference."""

import torch
from torch import Tensor

from lightlm.device import autocast
from lightlm.model.moe import Router
from lightlm.model.transformer import Transformer
from lightlm.train.step.divergence import TeacherStates
from lightlm.train.step.loss import head_input, padded


class Teacher:
    """A frozen model that says what may come next.

    Each process has all of it. Its products run in `dtype`; the residual stream, norms and routers are fp32.

    Args:
        model: is changed: its matrices are rounded to `dtype`.
        vocab_size: tokens that the tokenizer has; rows of the teacher's table after them count for nothing.
    """

    def __init__(self, model: Transformer, vocab_size: int, dtype: torch.dtype) -> None:
        self.model, self.dtype = model.eval().requires_grad_(False), dtype
        if dtype != torch.float32:
            routed = {id(p) for part in model.modules() if isinstance(part, Router) for p in part.parameters()}
            for parameter in model.blocks.parameters():
                if parameter.ndim > 1 and id(parameter) not in routed:
                    parameter.data = parameter.data.to(dtype)
        head_VE = model.head_weight.data[:vocab_size]
        self.vocab_size = len(head_VE)
        # On a CPU, fp32 products take the table itself.
        whole = model.device.type == "cpu" and dtype == torch.float32
        self._head_WE = head_VE if whole else padded(head_VE, dtype)
        if not (whole or model.config.tie_embeddings):
            del model.lm_head  # its copy takes its place

    @torch.no_grad()
    def __call__(self, inputs_BT: Tensor, offsets_BT: Tensor | None = None) -> TeacherStates:
        """Return the last hidden states of all tokens; `offsets_BT` as in `Transformer.hidden_states`."""
        device = inputs_BT.device
        with torch.autocast(device.type, enabled=False), autocast(device, self.dtype):
            x_NE = head_input(self.model, inputs_BT, offsets_BT=offsets_BT)
        return TeacherStates(x_NE, self._head_WE, self.vocab_size)
