"""Muon, NorMuon and a beta2 by tokens on FSDP2's shards: two processes, each with half of every weight."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightlm.optim.groups import set_step
from lightlm.optim.orthogonal import Muon, NorMuon, polynomials
from lightlm.optim.section import StepSettings
from lightlm.optim.state import load_named_state, named_state
from tests.optim.built import optimizer_for
from tests.shapes import build

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


KINDS = (
    {"name": "muon"},
    {"name": "muon", "cautious": True},
    {"name": "normuon", "cautious": True, "orthogonalization": "polar_express", "beta2_half_life": 300},
)


def _steps(model, settings):
    """Four steps on the same gradients in every process, the last two from saved state; returns whole weights."""
    optimizer = optimizer_for(model, lr=1e-2, **settings)
    tokens = torch.arange(64).reshape(4, 16)
    for step in range(4):
        if step == 2:
            saved = named_state(model, optimizer)
            optimizer = optimizer_for(model, lr=1e-2, **settings)
            load_named_state(model, optimizer, saved)
        set_step(optimizer, StepSettings(lr=1.0, weight_decay=1.0, momentum=0.9, batch_tokens=50 * (step + 1)))
        model(tokens).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def _expert_steps(mesh, kind, **more):
    """Two steps of three experts on two ranks: uneven shards of a stack."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    weight, gradient = torch.randn(3, 8, 20), torch.randn(3, 8, 20)
    place = (lambda t: distribute_tensor(t, mesh, [Shard(0)])) if mesh else torch.clone
    parameter = torch.nn.Parameter(place(weight))
    others = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    group = {"params": [parameter], "lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    settings = {"nesterov": True, "scale_rule": "original", "cautious": True}
    optimizer = kind([group], others, dtype=torch.float32, steps=polynomials("newton_schulz", 5), **settings, **more)
    for size in (1.0, 0.5):
        parameter.grad = place(size * gradient)
        optimizer.step()
    return parameter.full_tensor() if mesh else parameter.detach()


def _work(rank, url):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for settings in KINDS:
        sharded = build("qwen3")
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        whole = build("qwen3")
        for a, b in zip(_steps(sharded, settings), _steps(whole, settings), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    assert torch.equal(_expert_steps(mesh, Muon), _expert_steps(None, Muon))
    assert torch.equal(_expert_steps(mesh, NorMuon, beta2=0.9), _expert_steps(None, NorMuon, beta2=0.9))
    dist.destroy_process_group()


def test_two_ranks_take_the_steps_of_one(tmp_path):
    mp.spawn(_work, ((tmp_path / "rendezvous").as_uri(),), nprocs=2)
