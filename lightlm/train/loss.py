"""Cross-entropy of the next token, computed with the output head in chunks, so that all logits never exist at once.

Shapes: N tokens of a micro-batch, C tokens of a chunk, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightlm.model.transformer import Transformer

# fp32 logits of a chunk: 2**23 are 32 MB, about what stays in a CPU's last-level cache and is ample for a GPU.
_CHUNK_LOGITS = 1 << 23


def token_loss(model: Transformer, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum of -ln p(target) over a batch, in nats: an fp32 scalar."""
    x_ND = model.hidden_states(inputs_BT).flatten(0, 1)
    if torch.is_autocast_enabled(x_ND.device.type):
        x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
    return _HeadLoss.apply(x_ND, model.head_weight, targets_BT.flatten())


class _HeadLoss(torch.autograd.Function):
    """Linear layer and summed cross-entropy in one; gradients are made along with the loss, chunk by chunk.

    Products run in the precision of x; the loss, the softmax and the weight's gradient are fp32.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, master_VD: Tensor, targets_N: Tensor) -> Tensor:
        weight_VD = master_VD.to(x_ND.dtype)
        rows = max(_CHUNK_LOGITS // weight_VD.shape[0], 1)
        needs_grad = any(ctx.needs_input_grad)
        loss = torch.zeros((), device=x_ND.device, dtype=torch.float32)
        if needs_grad:
            grad_x_ND = torch.empty_like(x_ND)
            grad_weight_VD = torch.zeros_like(master_VD)
        with torch.autocast(x_ND.device.type, enabled=False):
            for start in range(0, len(x_ND), rows):
                x_CD, targets_C1 = x_ND[start : start + rows], targets_N[start : start + rows, None]
                logits_CV = (x_CD @ weight_VD.T).float()
                normaliser_C1 = logits_CV.logsumexp(-1, keepdim=True)
                loss += (normaliser_C1 - logits_CV.gather(1, targets_C1)).sum()
                if needs_grad:
                    # d loss / d logits = softmax - one_hot, made in the logits' own memory.
                    grad_CV = logits_CV.sub_(normaliser_C1).exp_()
                    grad_CV.scatter_add_(1, targets_C1, torch.full_like(normaliser_C1, -1.0))
                    grad_CV = grad_CV.to(x_ND.dtype)
                    torch.mm(grad_CV, weight_VD, out=grad_x_ND[start : start + rows])
                    grad_weight_VD += grad_CV.T @ x_CD
        if needs_grad:
            ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND * grad_loss, grad_weight_VD * grad_loss, None
