"""Rotary frequencies, scaled for longer texts."""

import math

import numpy as np
import pytest
import torch

from lightlm.model.config import ModelConfig
from lightlm.model.rotary import rotary_divisors, rotary_frequencies, rotary_table

PLAIN = ModelConfig(num_layers=1, hidden_size=64, num_heads=1, head_dim=64, max_seq_len=8192, rope_theta=500_000.0)
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_seq_len": 1024}


def config(**changes):
    return ModelConfig(**{**PLAIN.to_dict(), **changes}).resolved()


def test_linear_scaling_is_a_slower_clock():
    positions = torch.arange(0, 4000, 400)
    scaled = rotary_table(positions, config(rope_scaling="linear", rope_factor=4.0))
    plain = rotary_table(positions // 4, config())
    torch.testing.assert_close(scaled, plain, atol=1e-4, rtol=0)


def test_llama3_scaling_follows_its_three_cases():
    """Against the rule by wavelength, in float64."""
    plain = 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    expected = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 1024 / 4:
            expected.append(frequency)
        elif wavelength > 1024 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (1024 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    found = rotary_frequencies(config(**LLAMA3))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)
    np.testing.assert_allclose(rotary_divisors(config(**LLAMA3)).numpy(), plain / expected, rtol=1e-5)
    kinds = (found == rotary_frequencies(config())).sum().item(), (rotary_divisors(config(**LLAMA3)) == 8).sum().item()
    assert min(kinds) > 3  # both ends occur, and some lie between
    assert sum(kinds) < 32


def test_without_scaling_nothing_is_divided():
    assert torch.equal(rotary_divisors(config()), torch.ones(32))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rope_scaling": "linear", "rope_factor": 0.0}, "rope_factor: must be a number above 0"),
        ({**LLAMA3, "rope_low_freq_factor": 4.0}, "rope_high_freq_factor: must be above rope_low_freq_factor"),
        ({**LLAMA3, "rope_original_seq_len": -1}, "rope_original_seq_len: must be at least 0"),
    ],
)
def test_settings_that_divide_by_zero(changes, problem):
    with pytest.raises(ValueError, match=problem):
        config(**changes)


def test_the_first_training_was_as_long_unless_given():
    assert config(**LLAMA3 | {"rope_original_seq_len": 0}).rope_original_seq_len == 8192
    assert config().rope_original_seq_len == 0
