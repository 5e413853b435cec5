"""Scaled rotary frequencies, by hand: what stays, what is divided by the factor, and the temperature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fledge.model.rope import RopeScaling, scaled_frequencies, yarn_attention_factor

THETA, HEAD_DIM, CONTEXT = 10_000.0, 16, 64
PLAIN = [THETA ** (-2 * i / HEAD_DIM) for i in range(8)]


def frequencies(scaling: RopeScaling, length: int = CONTEXT) -> Tensor:
    return scaled_frequencies(scaling, THETA, HEAD_DIM, CONTEXT, torch.tensor([length]))[0].flatten()


def test_linear_divides_all() -> None:
    expected = torch.tensor(PLAIN) / 2.5
    torch.testing.assert_close(frequencies(RopeScaling("linear", 2.5)), expected)


def test_dynamic_does_nothing_within_the_context_and_stretches_the_slowest_pair_fully() -> None:
    scaling = RopeScaling("dynamic", 2.0)
    for length in (1, CONTEXT):
        torch.testing.assert_close(frequencies(scaling, length), torch.tensor(PLAIN))
    # At twice the context 2 * 2 - 1 = 3: the fastest pair stays, the slowest is 3 times as slow.
    ratio = torch.tensor(PLAIN) / frequencies(scaling, 2 * CONTEXT)
    assert ratio[0].item() == pytest.approx(1.0)
    assert ratio[-1].item() == pytest.approx(3.0, rel=1e-5)


def test_dynamic_frequencies_are_each_rows_own() -> None:
    lengths_B = torch.tensor([10, 200])
    both, _ = scaled_frequencies(RopeScaling("dynamic", 2.0), THETA, HEAD_DIM, CONTEXT, lengths_B)
    assert both.shape == (2, 1, 8)
    for row, length in zip(both, lengths_B, strict=True):
        assert torch.equal(row[0], frequencies(RopeScaling("dynamic", 2.0), int(length)))


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    found = frequencies(RopeScaling("llama3", 8.0, 512, low_freq_factor=1.0, high_freq_factor=4.0))
    for plain, scaled in zip(PLAIN, found.tolist(), strict=True):
        wave = 2 * math.pi / plain
        if wave < 512 / 4:
            assert scaled == pytest.approx(plain)
        elif wave > 512 / 1:
            assert scaled == pytest.approx(plain / 8)
        else:
            assert plain / 8 < scaled < plain
    assert sum(plain > 1.01 * scaled > 0 for plain, scaled in zip(PLAIN, found.tolist(), strict=True)) >= 3


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """Pairs that turn more than 32 times over the original length stay, those below once are divided."""
    found = frequencies(RopeScaling("yarn", 4.0, 512)).tolist()
    turns = [512 * plain / (2 * math.pi) for plain in PLAIN]
    assert max(turns) > 32 and min(turns) < 1
    for plain, scaled, turned in zip(PLAIN, found, turns, strict=True):
        if turned > 32:
            assert scaled == pytest.approx(plain)
        elif turned < 1:
            assert scaled == pytest.approx(plain / 4)
        else:
            assert plain / 4 <= scaled <= plain


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (RopeScaling("yarn", 4.0, 16), 0.1 * math.log(4) + 1),  # section 3.4 of the paper
        (RopeScaling("yarn", 1.0, 16), 1.0),
        (RopeScaling("yarn", 4.0, 16, attention_factor=1.5), 1.5),
        (
            RopeScaling("yarn", 4.0, 16, mscale=2.0, mscale_all_dim=1.0),
            (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
        ),
        (RopeScaling("yarn", 4.0, 16, mscale=2.0), 0.1 * math.log(4) + 1),
    ],
)
def test_the_temperature_of_yarn(scaling: RopeScaling, factor: float) -> None:
    assert yarn_attention_factor(scaling) == pytest.approx(factor)
    found = scaled_frequencies(scaling, THETA, HEAD_DIM, CONTEXT, torch.tensor([1]))[1]
    assert found == pytest.approx(factor)
