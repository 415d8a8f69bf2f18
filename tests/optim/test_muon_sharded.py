"""Muon on FSDP2's shards: two processes, each with half of every weight."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightlm.optim.orthogonal import Muon
from tests.optim.built import optimizer_for
from tests.shapes import build

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def _steps(model, cautious):
    """Three steps on the same gradients in every process; returns whole weights."""
    optimizer = optimizer_for(model, name="muon", lr=1e-2, cautious=cautious)
    tokens = torch.arange(64).reshape(4, 16)
    for _ in range(3):
        model(tokens).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def _expert_step(mesh):
    """Three experts and two ranks: uneven shards of a stack."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    weight, gradient = torch.randn(3, 8, 20), torch.randn(3, 8, 20)
    place = (lambda t: distribute_tensor(t, mesh, [Shard(0)])) if mesh else torch.clone
    parameter = torch.nn.Parameter(place(weight))
    parameter.grad = place(gradient)
    others = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    group = {"params": [parameter], "lr": 0.1, "weight_decay": 0.1}
    settings = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "scale_rule": "original", "cautious": True}
    Muon([group], others, dtype=torch.float32, **settings).step()
    return parameter.full_tensor() if mesh else parameter.detach()


def _work(rank, url):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for cautious in (False, True):
        sharded = build("qwen3")
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        whole = build("qwen3")
        for a, b in zip(_steps(sharded, cautious), _steps(whole, cautious), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    assert torch.equal(_expert_step(mesh), _expert_step(None))
    dist.destroy_process_group()


def test_two_ranks_take_the_steps_of_one(tmp_path):
    mp.spawn(_work, ((tmp_path / "rendezvous").as_uri(),), nprocs=2)
