"""What LightLM does on GPUs and Macs, with the answers of torch faked: tests run on CPUs."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

from lightlm import device as devices
from lightlm.errors import RecipeError, UsageError
from lightlm.evaluate.scoring import score as scoring
from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.tasks.checks import reason_of
from lightlm.model import attention
from lightlm.model.decoding.trees import Trees
from lightlm.recipe import load_recipe
from lightlm.train.step import compilation
from lightlm.train.step.gradients import micro_batch_size
from tests.shapes import SHAPES, build


@pytest.fixture
def cuda(monkeypatch):
    """Two GPUs, as far as torch is asked for them; change `capability` for other ones."""
    fake = SimpleNamespace(capability=(8, 0), chosen=[])
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": fake.chosen.append,
        "get_device_capability": lambda device=None: fake.capability,
        "get_device_name": lambda device=None: "a GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(major=fake.capability[0]),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"],
        "mem_get_info": lambda device=None: (8_000_000_000, 16_000_000_000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield fake
    getattr(devices.has_fast_bf16, "cache_clear", int)()


def test_a_named_gpu_becomes_the_current_one(cuda):
    assert devices.pick_device("cuda:1") == torch.device("cuda:1")
    assert cuda.chosen == [torch.device("cuda:1")]
    with pytest.raises(UsageError, match="cuda:2' is not available; this machine has cuda:0 to cuda:1"):
        devices.pick_device("cuda:2")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 9), True), ((11, 0), False), ((12, 1), True)],
)
def test_a_gpu_that_torch_has_no_code_for_is_left_alone(cuda, monkeypatch, capability, runs):
    """torch for CUDA 13 calls a GTX 1080 or a V100 available, and then fails at the first operation."""
    cuda.capability = capability
    assert devices.pick_device("auto").type == ("cuda" if runs else "cpu")
    if runs:
        assert devices.pick_device("cuda").type == "cuda"
    else:
        number = ".".join(map(str, capability))
        with pytest.raises(UsageError, match=rf"no code for a GPU \(compute capability {number}; it has sm_75 "):
            devices.pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx942"])  # ROCm
    assert devices.pick_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_training_takes_the_precision_that_a_gpu_has_units_for(cuda, capability, dtype):
    cuda.capability = capability
    getattr(devices.has_fast_bf16, "cache_clear", int)()
    assert devices.training_dtype("auto", torch.device("cuda")) == dtype
    assert devices.training_dtype("float32", torch.device("cuda")) == torch.float32
    notes: list[str] = []
    devices.training_dtype("bfloat16", torch.device("cuda"), 64, notes.append)
    assert bool(notes) == (capability < (8, 0))


@pytest.mark.parametrize("lacking", ["capability", "triton", "compiler"])
def test_compilation_falls_back_with_a_note(cuda, monkeypatch, lacking):
    found = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacking == "triton" else found)
    monkeypatch.setattr(shutil, "which", lambda name: None if lacking == "compiler" else name)
    monkeypatch.delenv("CC", raising=False)
    cuda.capability = (6, 1) if lacking == "capability" else (9, 0)
    words = {"capability": "7.0 or later (this one has 6.1)", "triton": "triton", "compiler": "a C compiler"}[lacking]
    notes = []
    recipe, gpu = load_recipe("demo"), torch.device("cuda")
    assert compilation.compiles(recipe, None, gpu, torch.bfloat16, notes.append) is False
    assert len(notes) == 1
    assert words in notes[0]
    with pytest.raises(RecipeError, match=r"set train\.compile=false"):
        compilation.compiles(load_recipe("demo", ["train.compile=true"]), None, gpu, torch.bfloat16)
    assert (
        compilation.compiles(load_recipe("demo", ["train.compile=false"]), None, gpu, torch.bfloat16, notes.append)
        is False
    )
    assert len(notes) == 1


def test_a_complete_gpu_machine_compiles(cuda, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    notes = []
    assert compilation.compiles(load_recipe("demo"), None, torch.device("cuda"), torch.bfloat16, notes.append) is True
    assert notes == []


def test_the_micro_batch_fits_the_precision(cuda):
    recipe, gpu = load_recipe("lightlm", ["model.vocab_size=50257"]), torch.device("cuda")
    sizes = [micro_batch_size(recipe, gpu, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert sizes[1] < sizes[0]  # fp32 keeps about twice as much


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_lack_of_memory_halves_the_batches_of_an_evaluation(monkeypatch, error):
    assert reason_of(error) == "the device is out of memory; lower --batch-size"
    model, score_batch, sizes = build("llama"), scoring._score_batch, []
    pairs = [([first, 1, 2], [3]) for first in range(40)]
    whole = scoring.score(model, pairs, BatchSize(4096))

    def short(model, trees, prefix):
        sizes.append(len(trees) * len(trees[0]))
        if sizes[-1] > 60:
            raise error
        return score_batch(model, trees, prefix)

    monkeypatch.setattr(scoring, "_score_batch", short)
    found = scoring.score(model, pairs, BatchSize(130))
    assert [s.log_likelihood for s in found] == pytest.approx([s.log_likelihood for s in whole], abs=1e-4)
    assert max(sizes) > 60 >= sizes[-1]
    monkeypatch.setattr(scoring, "_score_batch", lambda *_: (_ for _ in ()).throw(RuntimeError("an index is wrong")))
    with pytest.raises(RuntimeError, match="an index is wrong"):
        scoring.score(model, pairs, BatchSize(130))


def test_keys_are_repeated_where_no_fused_attention_takes_groups(cuda):
    asked = [
        ("cpu", torch.float32, True),
        ("cuda", torch.bfloat16, False),
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("mps", torch.float32, False),
    ]
    found = [attention.attends_in_groups(torch.device(kind), dtype, masked=masked) for kind, dtype, masked in asked]
    assert found == [True, True, False, False, False]
    cuda.capability = (7, 5)  # has no flash attention
    assert not attention.attends_in_groups(torch.device("cuda"), torch.float16, masked=False)


@pytest.mark.parametrize("name", [name for name, config in SHAPES.items() if config.num_kv_heads not in (0, 4)])
def test_repeated_keys_give_the_plain_result(name, monkeypatch):
    """In a causal pass, with a cache, and in trees of tokens, as scoring has them."""
    model = build(name)
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    trees = Trees(torch.tensor([[0, 1, 2, 2]]), torch.tensor([[4, 4, 3, 4]]))

    def outputs():
        cache = model.new_cache(2, 14)
        prefilled = model(tokens, cache)
        with torch.no_grad():
            return [
                model(tokens), prefilled, model(tokens[:, :1], cache),
                model.hidden_states(tokens[:1, :4], trees=trees),
            ]  # fmt: skip

    grouped = outputs()
    monkeypatch.setattr(attention, "attends_in_groups", lambda *_, **__: False)
    for plain, repeated in zip(grouped, outputs(), strict=True):
        torch.testing.assert_close(repeated, plain, atol=2e-5, rtol=1e-4)
