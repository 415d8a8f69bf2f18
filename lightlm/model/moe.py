"""Mixture of experts: a router, routed and shared experts (DeepSeekMoE, arXiv 2401.06066; DeepSeek-V3, 2412.19437).

The forward pass changes nothing in the module. It returns the experts' loads and the router's losses beside the output,
so recomputation, compilation and sharding cannot count a token twice.

Shapes: B batch, T positions, N = B T tokens, D hidden size, E experts, K experts of a token.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightlm.model.config import ModelConfig
from lightlm.model.experts import Experts
from lightlm.model.mlp import SwiGLU


class Routing(NamedTuple):
    """What a layer's router did with a batch."""

    load_E: Tensor  # int64: how many tokens each expert got
    balance: Tensor  # the balance loss, an fp32 scalar: 1 when all experts are used alike
    z: Tensor  # the mean over tokens of logsumexp(logits)^2, an fp32 scalar (arXiv 2202.08906)


class Router(nn.Module):
    """Choose experts for each token and weigh them, in fp32 whatever the model's precision.

    sigmoid: scores are sigmoids of the logits. `selection_bias` is added only for the choice; the trainer moves it, not
    gradients (arXiv 2408.15664). softmax: scores are probabilities, without a bias.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.chosen = config.router, config.num_experts_per_tok
        self.normalized, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if self.kind == "sigmoid" else None
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", bias)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the chosen experts (N, K), their weights (N, K), and all scores and logits (N, E)."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
            scores_NE = logits_NE.sigmoid() if self.kind == "sigmoid" else logits_NE.softmax(-1)
            choice_NE = scores_NE.detach()
            if self.selection_bias is not None:
                choice_NE = choice_NE + self.selection_bias
            ids_NK = choice_NE.topk(self.chosen, dim=-1).indices
            weights_NK = scores_NE.gather(1, ids_NK)
            if self.normalized:
                weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
            return ids_NK, weights_NK * self.scaling, scores_NE, logits_NE

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Move to devices and precisions. The bias stays fp32: in bf16 its steps of 0.001 would be lost."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype != bias.dtype:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self


class MoE(nn.Module):
    """The weighted sum of the experts chosen for each token, and shared experts for all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared: SwiGLU | None = None
        if config.num_shared_experts:
            self.shared = SwiGLU(config, config.num_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing | None]:
        """Return the output (B, T, D), and what the router did where gradients are wanted."""
        x_ND = x_BTD.flatten(0, 1)
        ids_NK, weights_NK, scores_NE, logits_NE = self.router(x_ND)
        y_BTD = self.experts(x_ND, ids_NK, weights_NK).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        if not torch.is_grad_enabled():
            return y_BTD, None
        batch, num_experts = len(x_BTD), scores_NE.shape[1]
        load_BE = ids_NK.new_zeros(batch, num_experts)
        load_BE.scatter_add_(1, ids_NK.view(batch, -1), torch.ones_like(ids_NK).view(batch, -1))
        load_E = load_BE.sum(0)
        if self.router.kind == "sigmoid":
            balance = sequence_balance_loss(load_BE, scores_NE.view(batch, -1, num_experts))
        else:
            balance = batch_balance_loss(load_E, scores_NE)
        return y_BTD, Routing(load_E, balance, logits_NE.logsumexp(-1).square().mean())


def sequence_balance_loss(load_BE: Tensor, scores_BTE: Tensor) -> Tensor:
    """Return the mean over sequences of sum_e f_e P_e (arXiv 2412.19437, equations 17 to 20, without its alpha).

    f_e is expert e's share of a sequence's choices, times E. P_e is the mean over tokens of its share of the sum of all
    scores.
    """
    share_BE = load_BE * (scores_BTE.shape[-1] / load_BE.sum(-1, keepdim=True))
    score_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return (share_BE * score_BE).sum(-1).mean()


def batch_balance_loss(load_E: Tensor, probabilities_NE: Tensor) -> Tensor:
    """Return sum_e f_e P_e over the tokens of a forward pass (arXiv 2101.03961, equations 4 to 6), for all K choices.

    f_e is expert e's share of all choices, times E. P_e is the mean of its probability.
    """
    return (load_E * (probabilities_NE.shape[-1] / load_E.sum()) * probabilities_NE.mean(0)).sum()
