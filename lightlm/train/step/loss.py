"""Cross-entropy of the next token, computed together with the output head in chunks of all logits.

Shapes: N tokens of a micro-batch, R tokens of a chunk, S tokens of a slice, D hidden size, V vocabulary, W vocabulary
padded to a multiple of 128.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightlm.model.dropout import Dropout
from lightlm.model.fused import add_
from lightlm.model.moe import Routing
from lightlm.model.products import has_slow_mkl, product
from lightlm.model.transformer import Transformer
from lightlm.train.step.divergence import Mix, SoftTargets, mixed_gradient_

# Matrix units are slower on rows whose length is not a multiple of a cache line, such as GPT-2's 50,257 entries.
_VOCAB_MULTIPLE = 128
# Tokens whose logits are held at once: on a CPU 206 MB in bf16 at 50,257 entries. Every chunk adds to the whole (V, D)
# gradient of the weight once more.
_CHUNK = {"cpu": 2048, "mps": 2048, "cuda": 4096}
# Entries of the vocabulary that one product sums over, where not all. On M1 and M2, torch before 2.14 adds memory
# beyond the operands to sums over 32,767 or more (pytorch#195163).
_SUMMED = {"mps": 16_384}
# Elements that the fp32 softmax works on at once on a CPU: 1 MB, which stays in its caches; and the fewest rows, below
# which launching the operations dominates. A GPU takes a whole chunk.
_SLICE_ELEMENTS, _SLICE_ROWS = 1 << 18, 16
_TAUGHT_ROWS = 1024  # beside a teacher's, a GPU takes fewer: five fp32 tensors of them exist at once


class TokenLosses(NamedTuple):
    """Sums over the tokens of a batch, fp32 scalars."""

    objective: Tensor  # what is differentiated: `loss`, mixed with `kl`, plus the coefficient times `z`
    loss: Tensor  # -ln p(target), in nats
    z: Tensor | None = None  # logsumexp(logits)^2; None with a coefficient of 0
    kl: Tensor | None = None  # divergence from a teacher, times the square of the temperature; None without one
    mtp_2: Tensor | None = None  # the cross-entropy of multi-token prediction, and its number of targets


class Lesson(NamedTuple):
    """What a teacher says about the next tokens of a micro-batch, and how it mixes with the tokens themselves."""

    targets: SoftTargets
    mix: Mix


def token_losses(
    model: Transformer,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    routings: list[Routing] | None = None,
    *,
    z_loss: float = 0.0,
    dropout: Dropout | None = None,
    offsets_BT: Tensor | None = None,
    masked: bool = False,
    lesson: Lesson | None = None,
    mtp_weight: Tensor | None = None,
) -> TokenLosses:
    """Return the cross-entropy of a batch and the z-loss of its logits (PaLM, arXiv 2204.02311, section 5).

    With `mtp_weight`, the objective also has the losses of multi-token prediction, averaged over the heads, times this
    weight (arXiv 2412.19437, equations 24 and 25).

    Args:
        routings, dropout, offsets_BT: see `Transformer.hidden_states`.
        z_loss: coefficient of logsumexp(logits)^2 per token.
        masked: negative targets are not trained on: the head does not see their tokens.
        lesson: of a teacher, see `lightlm.train.step.divergence`.
    """
    mtp_states: list[Tensor] | None = None if mtp_weight is None else []
    options: dict[str, Any] = {"routings": routings, "dropout": dropout, "offsets_BT": offsets_BT}
    x_ND = head_input(model, inputs_BT, **options, mtp_states=mtp_states)
    objective, *others = _sums(x_ND, model, targets_BT, z_loss, lesson, masked=masked)
    loss = others[0] if others else objective
    z, kl = others[1] if z_loss else None, others[-1] if lesson is not None else None
    if mtp_weight is None or not mtp_states:
        return TokenLosses(objective, loss, z, kl)
    mtp_2 = _mtp_loss(model, mtp_states, targets_BT, offsets_BT, masked=masked)
    return TokenLosses(objective + mtp_weight / len(mtp_states) * mtp_2[0], loss, z, kl, mtp_2.detach())


def _sums(
    x_ND: Tensor, model: Transformer, targets_BT: Tensor, z_loss: float, lesson: Lesson | None, *, masked: bool
) -> tuple[Tensor, ...]:
    """Return the outputs of `_HeadLoss`; `masked` leaves out negative targets."""
    if masked or lesson is not None:
        return _uncompiled_head_loss(x_ND, model.head_weight, targets_BT.flatten(), z_loss, lesson, masked)
    sums: tuple[Tensor, ...] = _HeadLoss.apply(x_ND, model.head_weight, targets_BT.flatten(), z_loss, None)
    return sums


def _mtp_loss(
    model: Transformer, mtp_states: list[Tensor], targets_BT: Tensor, offsets_BT: Tensor | None, *, masked: bool
) -> Tensor:
    """Return the cross-entropy of all heads of multi-token prediction, and the number of their targets: fp32 (2,).

    A target counts where it counts for the model. Inside documents, head k predicts only from columns whose next k
    tokens belong to the same document; the token after them may begin another, as for the model.
    """
    loss, count = torch.zeros((), device=targets_BT.device), torch.zeros((), device=targets_BT.device)
    for number, state_BTD in enumerate(mtp_states, 1):
        ahead_BT = targets_BT[:, number:]
        if offsets_BT is not None:
            ahead_BT = torch.where(offsets_BT[:, number:] >= number, ahead_BT, -1)
        x_ND = _for_products(state_BTD[:, :-number].flatten(0, 1))
        only_some = masked or offsets_BT is not None
        loss = loss + _sums(x_ND, model, ahead_BT, 0.0, None, masked=only_some)[0]
        count = count + ((ahead_BT >= 0).sum() if only_some else ahead_BT.numel())
    return torch.stack([loss, count])


def token_loss(model: Transformer, inputs_BT: Tensor, targets_BT: Tensor, offsets_BT: Tensor | None = None) -> Tensor:
    """Return the sum of -ln p(target) over a batch, in nats: an fp32 scalar. See `token_losses`."""
    return token_losses(model, inputs_BT, targets_BT, offsets_BT=offsets_BT).loss


@torch.no_grad()
def target_losses(
    model: Transformer,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    offsets_BT: Tensor | None = None,
    *,
    masked: bool = False,
) -> Tensor:
    """Return -ln p of each target, in nats: fp32 (N,), without gradients. `token_loss` is their sum.

    With `masked`, it is 0 for a negative target.
    """
    x_ND, targets_N = head_input(model, inputs_BT, offsets_BT=offsets_BT), targets_BT.flatten()
    with torch.autocast(x_ND.device.type, enabled=False):
        if not masked:
            return _head_loss(x_ND, model.head_weight, targets_N, 0.0, with_gradients=False)[0]
        return _uncompiled_losses(x_ND, model.head_weight, targets_N)


@torch.compiler.disable  # the number of trained tokens differs from batch to batch
def _uncompiled_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Return the loss of each target that is not negative, and 0 for the others."""
    trained_N = targets_N >= 0
    losses_N = torch.zeros(len(targets_N), device=x_ND.device)
    losses_N[trained_N] = _head_loss(x_ND[trained_N], weight_VD, targets_N[trained_N], 0.0, with_gradients=False)[0]
    return losses_N


def head_input(model: Transformer, inputs_BT: Tensor, **options: Any) -> Tensor:
    """Return the last hidden states as (N, D), in the precision of products."""
    return _for_products(model.hidden_states(inputs_BT, **options).flatten(0, 1))


def _for_products(x_ND: Tensor) -> Tensor:
    """Return states in the precision of products."""
    if torch.is_autocast_enabled(x_ND.device.type):
        x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
    return x_ND


@torch.compiler.disable  # the number of trained tokens differs from batch to batch
def _uncompiled_head_loss(
    x_ND: Tensor, master_VD: Tensor, targets_N: Tensor, z_loss: float, lesson: Lesson | None, masked: bool
) -> tuple[Tensor, ...]:
    """Return the sums of `_HeadLoss`, with `masked` over the tokens whose target is not negative."""
    if masked:
        trained_N = targets_N >= 0
        x_ND, targets_N = x_ND[trained_N], targets_N[trained_N]
        lesson = lesson and lesson._replace(targets=lesson.targets.select(trained_N))
    sums: tuple[Tensor, ...] = _HeadLoss.apply(x_ND, master_VD, targets_N, z_loss, lesson)
    return sums


class _HeadLoss(torch.autograd.Function):
    """Linear layer and summed cross-entropy in one. The forward pass also makes the gradients, chunk by chunk.

    Products run in the precision of x; the loss, the softmax and the sums of the weight's gradient are fp32. The
    outputs are the objective, which has the gradients; the loss, where it differs from the objective; and with their
    settings z and kl of `TokenLosses`.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, master_VD: Tensor, targets_N: Tensor, z_loss: float, lesson: Lesson | None
    ) -> tuple[Tensor, ...]:
        with torch.autocast(x_ND.device.type, enabled=False):
            losses_N, lse_N, kl_N, *grads = _head_loss(
                x_ND, master_VD, targets_N, z_loss, lesson, with_gradients=any(ctx.needs_input_grad)
            )
        ctx.grads = grads  # not saved for backward, which would keep a reference: see there
        loss = losses_N.sum()
        if not z_loss and lesson is None:
            return (loss,)
        objective, parts = loss, [loss]
        if kl_N is not None and lesson is not None:
            parts.append(kl_N.sum())
            objective = (1 - lesson.mix.weight) * loss + lesson.mix.weight * parts[1]
        if z_loss:
            parts.insert(1, lse_N.square().sum())
            objective = objective + z_loss * parts[1]
        ctx.mark_non_differentiable(*parts)
        return objective, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Nothing else may refer to the weight's gradient: autograd then adds a tied table's sparse part in place.
        (grad_x_ND, grad_weight_VD), ctx.grads = ctx.grads, None
        return grad_x_ND * grad_objective, grad_weight_VD.mul_(grad_objective), None, None, None


def _head_loss(
    x_ND: Tensor,
    master_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    lesson: Lesson | None = None,
    *,
    with_gradients: bool,
) -> tuple[Any, ...]:
    """Return the loss and the log-sum-exp of each target's logits, and its divergence from the teacher, if any.

    `with_gradients`, also return the gradients of x and of the weight by the objective: the sum of the losses, mixed
    with that of the divergences, plus `z_loss` times that of the squared log-sum-exps.
    """
    if not len(x_ND):  # a micro-batch without a token to train on
        none_N = x_ND.new_empty(0, dtype=torch.float32)
        grads = (torch.empty_like(x_ND), torch.zeros_like(master_VD)) if with_gradients else ()
        return none_N, none_N, None if lesson is None else none_N, *grads
    if x_ND.device.type == "cpu" and x_ND.dtype == master_VD.dtype == torch.float32:
        return _full_head_loss(x_ND, master_VD, targets_N, z_loss, lesson, with_gradients=with_gradients)
    vocab_size = len(master_VD)
    weight_WD = padded(master_VD, x_ND.dtype)
    rows = min(_CHUNK[x_ND.device.type], len(x_ND))
    logits_RW = x_ND.new_empty(rows, len(weight_WD))
    losses_N, lse_N = (torch.empty(len(x_ND), device=x_ND.device, dtype=torch.float32) for _ in range(2))
    kl_N = None if lesson is None else torch.empty_like(losses_N)
    if with_gradients:
        grad_x_ND, grad_weight_VD = torch.empty_like(x_ND), torch.empty_like(master_VD)
        product_WD = torch.empty_like(weight_WD)
    for start in range(0, len(x_ND), rows):
        chunk = slice(start, start + rows)
        x_RD, targets_R = x_ND[chunk], targets_N[chunk]
        logits = torch.mm(x_RD, weight_WD.T, out=logits_RW[: len(x_RD)])
        if lesson is None or kl_N is None:
            losses_N[chunk], lse_N[chunk] = _softmax_(logits[:, :vocab_size], targets_R, z_loss)
            if with_gradients:
                at_targets = _target_gradient(losses_N[chunk], lse_N[chunk], z_loss).to(x_ND.dtype)
                logits[torch.arange(len(x_RD), device=logits.device), targets_R] = at_targets
        else:
            losses_N[chunk], lse_N[chunk], kl_N[chunk] = _taught_gradient_(
                logits[:, :vocab_size], targets_R, lesson, chunk, z_loss
            )
        if with_gradients:
            _multiply(logits, weight_WD, grad_x_ND[chunk])
            torch.mm(logits.T, x_RD, out=product_WD)
            add_(grad_weight_VD, product_WD[:vocab_size], first=start == 0)
    return (losses_N, lse_N, kl_N, grad_x_ND, grad_weight_VD) if with_gradients else (losses_N, lse_N, kl_N)


def _multiply(logits_RW: Tensor, weight_WD: Tensor, out_RD: Tensor) -> None:
    """Write the product of logits' gradients and the weight."""
    size = _SUMMED.get(out_RD.device.type)
    if size is None:
        torch.mm(logits_RW, weight_WD, out=out_RD)
        return
    out_RD.zero_()
    for logits_RC, weight_CD in zip(logits_RW.split(size, dim=1), weight_WD.split(size), strict=True):
        out_RD.addmm_(logits_RC, weight_CD)


def _full_head_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    lesson: Lesson | None,
    *,
    with_gradients: bool,
) -> tuple[Any, ...]:
    """Compute `_head_loss` in fp32 on a CPU, where nothing needs a copy: neither the weight nor the softmax's input."""
    rows = min(_CHUNK["cpu"], len(x_ND))
    losses_N, lse_N = x_ND.new_empty(len(x_ND)), x_ND.new_empty(len(x_ND))
    kl_N = None if lesson is None else torch.empty_like(losses_N)
    grad_x_ND, grad_weight_VD = torch.empty_like(x_ND), None
    for start in range(0, len(x_ND), rows):
        chunk = slice(start, start + rows)
        x_RD, targets_R = x_ND[chunk], targets_N[chunk]
        logits_RV = product(x_RD, weight_VD.T)
        if lesson is None or kl_N is None:
            losses_N[chunk], lse_N[chunk] = _softmax_(logits_RV, targets_R, z_loss)
            if with_gradients:
                at_targets = _target_gradient(losses_N[chunk], lse_N[chunk], z_loss)
                logits_RV[torch.arange(len(x_RD)), targets_R] = at_targets
        else:
            losses_N[chunk], lse_N[chunk], kl_N[chunk] = _taught_gradient_(logits_RV, targets_R, lesson, chunk, z_loss)
        if with_gradients:
            grad_x_ND[chunk] = product(logits_RV, weight_VD)
            if grad_weight_VD is None:
                grad_weight_VD = product(logits_RV.T, x_RD)
            elif has_slow_mkl():
                grad_weight_VD += product(logits_RV.T, x_RD)
            else:
                grad_weight_VD.addmm_(logits_RV.T, x_RD)
        del logits_RV  # before the next chunk's
    sums = losses_N, lse_N, kl_N
    return (*sums, grad_x_ND, grad_weight_VD) if grad_weight_VD is not None else sums


def _taught_gradient_(
    logits_RV: Tensor, targets_R: Tensor, lesson: Lesson, chunk: slice, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the logits of a chunk as `mixed_gradient_` does; return what it returns."""
    rows, vocab_size = logits_RV.shape
    size = min(rows, taught_rows(vocab_size, logits_RV.device.type))
    return mixed_gradient_(logits_RV, targets_R, lesson.targets.chunk(chunk), lesson.mix, z_loss, size)


def chunk_rows(device_type: str) -> int:
    """Return the tokens whose logits are held at once."""
    return _CHUNK[device_type]


def taught_rows(vocab_size: int, device_type: str) -> int:
    """Return the rows of logits that the fp32 divergence from a teacher works on at once."""
    return softmax_rows(vocab_size) if device_type == "cpu" else _TAUGHT_ROWS


def softmax_rows(vocab_size: int) -> int:
    """Return the rows of logits that the fp32 softmax works on at once on a CPU."""
    return max(_SLICE_ELEMENTS // vocab_size, _SLICE_ROWS)


def _target_gradient(losses_R: Tensor, lse_R: Tensor, z_loss: float) -> Tensor:
    """Return the objective's gradient by the logit of each target.

    It is softmax - 1, computed from the loss, since 1 - p would cancel where p is near 1, plus the z-loss's part.
    """
    gradient_R = torch.expm1(-losses_R)
    return gradient_R + 2 * z_loss * lse_R * torch.exp(-losses_R) if z_loss else gradient_R


def head_loss_bytes(
    tokens: int, hidden_size: int, vocab_size: int, device_type: str, dtype: torch.dtype, *, accumulates: bool
) -> int:
    """Return the bytes that `_head_loss` holds at its peak.

    Args:
        accumulates: the weight already has a gradient, so the new one takes memory of its own.
    """
    rows, element = min(_CHUNK[device_type], tokens), dtype.itemsize
    earlier = 4 * vocab_size * hidden_size if accumulates else 0
    if device_type == "cpu" and dtype == torch.float32:
        product_bytes = 4 * vocab_size * hidden_size if tokens > rows and has_slow_mkl() else 0
        return 4 * rows * vocab_size + product_bytes + 8 * hidden_size * tokens + earlier
    padded = -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    fp32_rows = softmax_rows(vocab_size) if device_type == "cpu" else rows
    return (
        element * rows * padded  # logits
        + 4 * fp32_rows * vocab_size
        + 2 * element * padded * hidden_size  # the weight's copy, and its gradient from one chunk
        + 2 * element * tokens * hidden_size  # x and its gradient
        + earlier
    )


def padded(master_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in this precision, with rows of zeros up to a multiple that matrix units like."""
    vocab_size, hidden_size = master_VD.shape
    weight_WD = master_VD.new_empty(-(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE, hidden_size, dtype=dtype)
    weight_WD[:vocab_size] = master_VD
    weight_WD[vocab_size:] = 0
    return weight_WD


def _softmax_(logits_RV: Tensor, targets_R: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Replace logits by the objective's gradient, target terms aside; return loss and log-sum-exp of each row, in fp32.

    This gradient is the softmax times 1 + 2 z_loss logsumexp(logits).
    """
    rows, vocab_size = logits_RV.shape
    size = softmax_rows(vocab_size) if logits_RV.device.type == "cpu" else rows
    copied = logits_RV.dtype != torch.float32
    full_SV = logits_RV.new_empty(size, vocab_size, dtype=torch.float32) if copied else logits_RV
    losses_R, lse_R = (logits_RV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    for start in range(0, rows, size):
        chunk = slice(start, start + size)
        part, targets = logits_RV[chunk], targets_R[chunk, None]
        full = full_SV[: len(part)].copy_(part) if copied else part
        target, peak = full.gather(1, targets), full.amax(-1, keepdim=True)
        total = full.sub_(peak).exp_().sum(-1, keepdim=True)
        lse = total.log() + peak
        losses_R[chunk], lse_R[chunk] = (lse - target)[:, 0], lse[:, 0]
        full.mul_((1.0 + 2 * z_loss * lse) / total if z_loss else 1.0 / total)
        if copied:
            part.copy_(full)
    return losses_R, lse_R
