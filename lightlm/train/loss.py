"""Cross-entropy of the next token, computed with the output head in chunks, so that all logits never exist at once.

Shapes: N tokens of a micro-batch, R rows of a buffer, C <= R tokens of a chunk, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightlm.model.transformer import Transformer


def chunk_rows(vocab_size: int) -> int:
    """Tokens whose logits are held at once.

    Small chunks stay in a CPU's caches, but each adds the whole (V, D) weight gradient once more. Forward and
    backward of 4,096 tokens on 2 cores (benchmarks/head_loss.py): V 8,192, D 256: 76 ms at 256 rows, 66 at 512, 75
    at 1,024, 128 at 4,096; V 50,257, D 576: 1,427 ms at 256, 1,127 at 1,024, 1,044 at 4,096, where the logits alone
    are 824 MB.
    """
    return 512 if vocab_size <= 16_384 else 1024


def token_loss(model: Transformer, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum of -ln p(target) over a batch, in nats: an fp32 scalar."""
    x_ND = model.hidden_states(inputs_BT).flatten(0, 1)
    if torch.is_autocast_enabled(x_ND.device.type):
        x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
    return _HeadLoss.apply(x_ND, model.head_weight, targets_BT.flatten())


class _HeadLoss(torch.autograd.Function):
    """Linear layer and summed cross-entropy in one; gradients are made along with the loss, chunk by chunk.

    Products run in the precision of x; the loss, the softmax and the weight's gradient are fp32. All chunks share
    their buffers: on a CPU, a buffer this large is returned to the system when freed, and fresh pages cost more
    than the arithmetic done in them.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, master_VD: Tensor, targets_N: Tensor) -> Tensor:
        weight_VD = master_VD.to(x_ND.dtype)
        rows = min(chunk_rows(len(weight_VD)), len(x_ND))
        needs_grad = any(ctx.needs_input_grad)
        loss = torch.zeros((), device=x_ND.device, dtype=torch.float32)
        low_RV = torch.empty(rows, len(weight_VD), device=x_ND.device, dtype=x_ND.dtype)
        full_RV = torch.empty_like(low_RV, dtype=torch.float32)
        if needs_grad:
            grad_x_ND, grad_weight_VD = torch.empty_like(x_ND), torch.zeros_like(master_VD)
            product_VD = torch.empty_like(weight_VD)
        with torch.autocast(x_ND.device.type, enabled=False):
            for start in range(0, len(x_ND), rows):
                x_CD, targets_C1 = x_ND[start : start + rows], targets_N[start : start + rows, None]
                low_CV, full_CV = low_RV[: len(x_CD)], full_RV[: len(x_CD)]
                torch.mm(x_CD, weight_VD.T, out=low_CV)
                loss += _cross_entropy_(full_CV.copy_(low_CV), targets_C1)
                if needs_grad:
                    low_CV.copy_(full_CV)
                    torch.mm(low_CV, weight_VD, out=grad_x_ND[start : start + rows])
                    grad_weight_VD += torch.mm(low_CV.T, x_CD, out=product_VD)
        if needs_grad:
            ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND * grad_loss, grad_weight_VD.mul_(grad_loss), None


def _cross_entropy_(logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """The summed loss of fp32 logits, which become its gradient, softmax - one_hot, in place."""
    target_C1 = logits_CV.gather(1, targets_C1)
    peak_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(peak_C1).exp_()
    total_C1 = exp_CV.sum(-1, keepdim=True)
    exp_CV.div_(total_C1).scatter_add_(1, targets_C1, torch.full_like(total_C1, -1.0))
    return (total_C1.log() + peak_C1 - target_C1).sum()
