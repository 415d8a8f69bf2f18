import pytest
import torch

from lightlm import device
from lightlm.errors import UsageError


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
    ],
)
def test_peaks_belong_to_whole_names(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device.peak_flops(torch.device("cuda")) == peak


def test_unknown_devices_and_precisions_are_refused():
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        device.pick_device("tpu")
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        device.pick_dtype("int8", torch.device("cpu"))
    assert device.pick_dtype("float32", torch.device("cpu")) == torch.float32
