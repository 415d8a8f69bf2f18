"""Runs of a tiny mixture of experts, and what its routers did, counted without the counts under test."""

import numpy as np
import torch

from lightlm.model.moe import Router
from lightlm.recipe import load_recipe
from tests.train.watch import Recorder, make_trainer

MOE = (
    "model.num_experts=5",
    "model.num_experts_per_tok=2",
    "model.moe_intermediate_size=24",
    "eval.prompts=[]",
)
SIGMOID_MODEL = (*MOE, "model.num_shared_experts=1", "model.first_k_dense=1", "model.num_layers=3")
SIGMOID = (*SIGMOID_MODEL, "moe.bias_update_rate=0.01")
SOFTMAX = (*MOE, "model.router=softmax", "model.norm_topk_prob=false")
SHORT = "train.tokens=1280"  # 5 steps


class Routed:
    """For each step of a run and each router: (tokens that each expert got, its bias afterwards), as arrays.

    Choices are made again in float64 from each forward pass's input and the weights of that moment.
    """

    def __init__(self, trainer):
        self.steps, self._trainer, self._passes = [], trainer, []
        self._routers = [module for module in trainer.model.modules() if isinstance(module, Router)]
        for router in self._routers:
            router.register_forward_pre_hook(self._remember)
        self._step, trainer._step = trainer._step, self._record

    def _remember(self, router, inputs):
        in_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing's second pass
        if in_backward or not self._trainer.model.training:
            return
        logits_NE = inputs[0].detach().double() @ _local(router.weight).double().T
        scores_NE = logits_NE.sigmoid() + router.selection_bias if router.selection_bias is not None else logits_NE
        ids_NK = scores_NE.argsort(descending=True)[:, : router.chosen].numpy()
        self._passes.append((self._routers.index(router), np.bincount(ids_NK.flatten(), minlength=scores_NE.shape[1])))

    def _record(self, stop):
        self._passes.clear()
        metrics = self._step(stop)
        if metrics is not None:
            # DistributedDataParallel's first step is preceded by passes whose gradients are dropped.
            repeats = self._trainer.model.config.layer_sharing
            last = self._passes[-self._trainer.facts()["accumulation"] * len(self._routers) * repeats :]
            self.steps.append([self._of(index, last) for index in range(len(self._routers))])
        return metrics

    def _of(self, index, passes):
        bias = self._routers[index].selection_bias
        return sum(load for router, load in passes if router == index), None if bias is None else bias.numpy().copy()


def _local(weight):
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def routed_run(name, *overrides, world=None, edit=None):
    """(metrics, what the routers did, the result) of a run; `edit` is called with the trainer before it starts."""
    watch = Recorder()
    trainer = make_trainer(load_recipe("tiny.yaml", overrides), name, watch, lambda *_: "...", world=world)
    if edit is not None:
        edit(trainer)
    routed = Routed(trainer)
    result = trainer.train()
    return watch.metrics, routed.steps, result


def expected_biases(loads_SLE, rate):
    """By NumPy, (S, L, E): the bias after each step, from the loads of all micro-batches and processes."""
    bias_LE, after = np.zeros(loads_SLE.shape[1:], dtype=np.float32), []
    for load_LE in loads_SLE:
        bias_LE = bias_LE + np.float32(rate) * np.sign(load_LE.mean(-1, keepdims=True) - load_LE).astype(np.float32)
        after.append(bias_LE)
    return np.stack(after)


def loads(steps):
    return np.array([[load for load, _ in step] for step in steps])


def biases(steps):
    return np.array([[bias for _, bias in step] for step in steps])
