"""Statistics of values that make one-pass formulas lose digits, and of values that are not finite."""

import pytest
import torch
from primitive_cases import CL, SPECIAL, name_of, with_value
from tolerances import STATS_EPS

from resnet_fused import primitives
from resnet_fused.primitives import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values_in_statistics(backend, case, dtype):
    x = SPECIAL[case](torch.randn(2, 8, 7, 6)).to(dtype).contiguous(memory_format=CL)
    stats = primitives.channel_stats(x)
    oracle, plain = reference.channel_stats(x.double()), reference.channel_stats(x)
    # M2 of 1e30 overflows in float32, there and here; where a channel holds NaN or inf, neither number means
    # anything.
    finite = plain.isfinite().all(0)
    assert torch.equal(stats.isfinite().all(0), finite)
    eps, count = torch.finfo(torch.float32).eps, x.numel() // x.shape[1]
    spread = (oracle[1] / count).sqrt()
    # The mean to a few ulp of itself, the deviations to a few ulp of x: at mean 1e6, E[x^2] - E[x]^2 would
    # lose all digits. Below the smallest normal number there are no relative errors.
    tiny = torch.finfo(torch.float32).smallest_normal
    mean_allowed = STATS_EPS * eps * (spread + oracle[0].abs()) + STATS_EPS * eps * tiny
    m2_allowed = STATS_EPS * eps * oracle[1] + STATS_EPS * count * (eps * oracle[0]).square() + tiny
    assert ((stats[0] - oracle[0]).abs() <= mean_allowed)[finite].all()
    assert ((stats[1] - oracle[1]).abs() <= m2_allowed)[finite].all()


#: Changes of x [2, C, 9, 8] that make one-pass formulas lose digits, and what M2 is allowed in units of STATS_EPS * eps.
#: A kernel takes deviations from the mean of what came before: with a first pixel that is 10,000 deviations away,
#: these are large for some tiles, and so is what their squares are rounded by (measured 5e-6 of M2, 42 eps).
HARD = {
    "mean 1e4": (lambda x: x + 1e4, 1),
    "constant": (lambda x: torch.full_like(x, 2.5), 1),
    "rising": (lambda x: x + 100 * torch.arange(9.0).view(1, 1, 9, 1), 1),
    "other image far away": (lambda x: x + torch.tensor([0.0, 1e3]).view(2, 1, 1, 1), 1),
    "first pixel far away": (with_value(0, slice(None), 0, 0, 1e4), 4),
    "last pixel far away": (with_value(1, slice(None), 8, 7, 1e4), 1),
}


@pytest.mark.parametrize("channels", [8, 16, 32, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", HARD)
def test_statistics_of_a_convolution(backend, case, dtype, channels):
    """Those that leave with the output; the convolution is the identity, so that the output is known."""
    change, factor = HARD[case]
    x = change(torch.randn(2, channels, 9, 8)).to(dtype).contiguous(memory_format=CL)
    weight = torch.eye(channels, dtype=dtype)[:, :, None, None]
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    y, stats = primitives.preact_conv_forward(x, None, weight, None, None, 0.0, *geometry, True)
    torch.testing.assert_close(y, x, rtol=1e-6 if dtype is torch.float32 else 0, atol=0)
    oracle, count = reference.channel_stats(y.double()), y.numel() // channels
    eps = torch.finfo(torch.float32).eps
    spread = (oracle[1] / count).sqrt()
    mean_allowed = STATS_EPS * eps * (spread + oracle[0].abs())
    m2_allowed = factor * STATS_EPS * eps * oracle[1] + STATS_EPS * count * (eps * oracle[0]).square()
    # Tiles' means are rounded where they lie, and merging squares their differences (measured: 0.05 of this
    # without the factor, at mean 1e4; E[x^2] - E[x]^2 would be off by several times M2).
    m2_allowed += 0.25 * eps * oracle[0].abs() * (count * oracle[1]).sqrt()
    assert ((stats[0] - oracle[0]).abs() <= mean_allowed).all()
    assert ((stats[1] - oracle[1]).abs() <= m2_allowed).all() and (stats[1] >= 0).all()
