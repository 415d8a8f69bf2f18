"""Cross-entropy of the next token, computed with the output head in chunks, so that all logits never exist at once.

Shapes: N tokens of a micro-batch, C tokens of a chunk, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightlm.model.transformer import Transformer


def chunk_rows(vocab_size: int) -> int:
    """Tokens whose logits are held at once.

    Small chunks stay in a CPU's caches, but each adds the whole (V, D) weight gradient once more. Forward and
    backward of 4,096 tokens on 2 cores: V 8,192, D 256: 99 ms at 256 rows, 147 at 1,024, 167 at 4,096; V 50,257,
    D 576: 2,178 ms at 256, 1,694 at 1,024, 1,323 at 4,096, where the logits alone are 824 MB.
    """
    return 256 if vocab_size <= 16_384 else 1024


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
        rows = chunk_rows(weight_VD.shape[0])
        needs_grad = any(ctx.needs_input_grad)
        loss = torch.zeros((), device=x_ND.device, dtype=torch.float32)
        if needs_grad:
            grad_x_ND = torch.empty_like(x_ND)
            grad_weight_VD = torch.zeros_like(master_VD)
        with torch.autocast(x_ND.device.type, enabled=False):
            for start in range(0, len(x_ND), rows):
                x_CD, targets_C1 = x_ND[start : start + rows], targets_N[start : start + rows, None]
                logits_CV = (x_CD @ weight_VD.T).float()
                target_C1 = logits_CV.gather(1, targets_C1)
                peak_C1 = logits_CV.amax(-1, keepdim=True)
                # From here on in the logits' own memory: fresh pages cost a CPU more than the arithmetic.
                exp_CV = logits_CV.sub_(peak_C1).exp_()
                total_C1 = exp_CV.sum(-1, keepdim=True)
                loss += (total_C1.log() + peak_C1 - target_C1).sum()
                if needs_grad:
                    # d loss / d logits = softmax - one_hot
                    exp_CV.div_(total_C1).scatter_add_(1, targets_C1, torch.full_like(total_C1, -1.0))
                    grad_CV = exp_CV.to(x_ND.dtype)
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
