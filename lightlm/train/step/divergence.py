"""Divergence of the model from a teacher, mixed with the cross-entropy, on slices of a chunk's logits.

The objective per token is (1 - weight) CE + weight T^2 KL(p || q). Here p = softmax(v / T) and q = softmax(z / T) are
the distributions of the teacher's logits v and the model's logits z at the temperature T, and

    KL(p || q) = sum_j p_j (ln p_j - ln q_j),    d(T^2 KL) / dz_j = T (q_j - p_j)

(Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2). T^2 keeps
the size of the gradient, which would else shrink with 1 / T^2.

Of a stored teacher only its K likeliest tokens are known, and the mass p_r of all others. Those others count as one
outcome, for both: KL = sum_k p_k (ln p_k - ln q_k) + p_r (ln p_r - ln q_r). By the log-sum inequality it is at most the
divergence over all tokens. Its gradient by the logit of an other token is q_j (1 - p_r / q_r).

Shapes: N tokens of a micro-batch, R tokens of a chunk, S tokens of a slice, V vocabulary of the model, U that of the
teacher, W the teacher's padded, E hidden size of the teacher, K stored tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightlm.model.products import product

_SMALLEST = 1e-30  # of a probability that divides; fp32 ends at 1e-38


class Mix(NamedTuple):
    """The settings of `train.distill` that the loss needs."""

    weight: float
    temperature: float


class TeacherLogits(NamedTuple):
    """A teacher's logits of some tokens."""

    logits_RU: Tensor

    def part(self, rows: slice) -> "TeacherLogits":
        return TeacherLogits(self.logits_RU[rows])


class TeacherStates(NamedTuple):
    """A teacher's last hidden states, from which logits are made chunk by chunk."""

    x_NE: Tensor
    head_WE: Tensor
    vocab_size: int  # U

    def select(self, chosen_N: Tensor) -> "TeacherStates":
        return self._replace(x_NE=self.x_NE[chosen_N])

    def chunk(self, rows: slice) -> TeacherLogits:
        x_RE = self.x_NE[rows]
        on_cpu = x_RE.device.type == "cpu" and x_RE.dtype == torch.float32
        logits_RW = product(x_RE, self.head_WE.T) if on_cpu else x_RE @ self.head_WE.T
        return TeacherLogits(logits_RW[:, : self.vocab_size])


class TopTokens(NamedTuple):
    """A teacher's likeliest next tokens, at temperature 1."""

    ids_NK: Tensor  # int64
    log_p_NK: Tensor  # fp32
    log_rest_N: Tensor  # ln of the mass of all other tokens; -inf for none

    def select(self, chosen_N: Tensor) -> "TopTokens":
        return TopTokens(self.ids_NK[chosen_N], self.log_p_NK[chosen_N], self.log_rest_N[chosen_N])

    def chunk(self, rows: slice) -> "TopTokens":
        return self.part(rows)

    def part(self, rows: slice) -> "TopTokens":
        return TopTokens(self.ids_NK[rows], self.log_p_NK[rows], self.log_rest_N[rows])


SoftTargets = TeacherStates | TopTokens


def mixed_gradient_(
    logits_RV: Tensor, targets_R: Tensor, teacher: TeacherLogits | TopTokens, mix: Mix, z_loss: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits by the objective's gradient; return cross-entropy, log-sum-exp and T^2 KL of each row, in fp32.

    Args:
        z_loss: coefficient of logsumexp(logits)^2, which is added to the objective.
        size: rows that the fp32 computation works on at once.
    """
    rows = len(logits_RV)
    losses_R, lse_R, kl_R = (logits_RV.new_empty(rows, dtype=torch.float32) for _ in range(3))
    for start in range(0, rows, size):
        part = slice(start, start + size)
        full_SV = logits_RV[part].float()  # the logits themselves where they are fp32
        targets_S1 = targets_R[part, None]
        if isinstance(teacher, TeacherLogits):
            sums = _full_gradient_(full_SV, targets_S1, teacher.part(part), mix, z_loss)
        else:
            sums = _top_gradient_(full_SV, targets_S1, teacher.part(part), mix, z_loss)
        losses_R[part], lse_R[part], kl_R[part] = sums
        if logits_RV.dtype != torch.float32:
            logits_RV[part] = full_SV
    return losses_R, lse_R, kl_R


def _full_gradient_(
    full_SV: Tensor, targets_S1: Tensor, teacher: TeacherLogits, mix: Mix, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a slice of `mixed_gradient_` with the teacher's logits."""
    weight, temperature = mix
    target, scaled_SV = full_SV.gather(1, targets_S1), full_SV / temperature
    lse, inverse = _exp_(full_SV)
    plain = (1 - weight) + 2 * z_loss * lse  # the factor on softmax(z) of cross-entropy and z-loss
    if temperature == 1:
        lse_at_t = lse
        full_SV.mul_((plain + weight) * inverse)
    else:
        lse_at_t = scaled_SV.logsumexp(-1, keepdim=True)
        full_SV.mul_(plain * inverse).add_((scaled_SV - lse_at_t).exp_(), alpha=weight * temperature)
    log_p_SU = (teacher.logits_RU.float() / temperature).log_softmax(-1)
    p_SU = log_p_SU.exp()
    known = p_SU.shape[1]  # a larger table of the model has rows that no token uses
    full_SV[:, :known].sub_(p_SU, alpha=weight * temperature)
    full_SV.scatter_add_(1, targets_S1, torch.full_like(target, weight - 1))
    kl = p_SU.mul_(log_p_SU.sub_(scaled_SV[:, :known]).add_(lse_at_t)).sum(-1)
    return (lse - target)[:, 0], lse[:, 0], temperature**2 * kl


def _top_gradient_(
    full_SV: Tensor, targets_S1: Tensor, teacher: TopTokens, mix: Mix, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a slice of `mixed_gradient_` with the teacher's likeliest tokens."""
    weight, (ids_SK, log_p_SK, log_rest_S) = mix.weight, teacher
    target, log_q_SK = full_SV.gather(1, targets_S1), full_SV.gather(1, ids_SK)
    lse, inverse = _exp_(full_SV)
    log_q_SK -= lse
    plain = (1 - weight) + 2 * z_loss * lse
    p_SK, q_SK, p_rest = log_p_SK.exp(), log_q_SK.exp(), log_rest_S[:, None].exp()
    # Summed over the others: 1 minus the sum of the known would cancel.
    q_rest = (full_SV.scatter_(1, ids_SK, 0.0).sum(-1, keepdim=True) * inverse).clamp_(min=_SMALLEST)
    full_SV.mul_((plain + weight * (1 - p_rest / q_rest)) * inverse)
    full_SV.scatter_(1, ids_SK, plain * q_SK + weight * (q_SK - p_SK))
    full_SV.scatter_add_(1, targets_S1, torch.full_like(target, weight - 1))
    kl = (p_SK * (log_p_SK - log_q_SK)).sum(-1) + torch.xlogy(p_rest, p_rest / q_rest)[:, 0]
    return (lse - target)[:, 0], lse[:, 0], kl


def _exp_(full_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logits - their largest); return their log-sum-exp, and 1 / the sum of the new values.

    Both are (S, 1).
    """
    peak = full_SV.amax(-1, keepdim=True)
    total = full_SV.sub_(peak).exp_().sum(-1, keepdim=True)
    return total.log() + peak, 1.0 / total
