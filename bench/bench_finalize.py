"""The finalize steps and the running statistics: a few hundred numbers, so the cost of a call is timed."""

import pytest
import torch
from harness import bn_rows, nbytes

CHANNELS = [64]
COUNT = 65536
BENCH_DTYPES = ["fp32"]  # statistics are, whatever the activations are


@pytest.mark.parametrize("channels", CHANNELS, ids="c{}".format)
def bench_finalize_forward(primitive, channels, device):
    stats = torch.stack((torch.randn(channels), torch.rand(channels) * COUNT)).to(device)
    weight, bias = torch.rand(channels, device=device), torch.randn(channels, device=device)
    primitive("finalize_forward", (stats, COUNT, None, None, weight, bias, 1e-5),
              {"bn": 0.0}, case=f"c{channels}", bytes_read=nbytes(stats, weight, bias))


@pytest.mark.parametrize("channels", CHANNELS, ids="c{}".format)
def bench_finalize_backward(primitive, channels, device):
    sums, bn = torch.randn(2, channels, device=device), bn_rows(channels, device)
    primitive("finalize_backward", (sums, bn, COUNT, True), {"coefficients": 0.0}, case=f"c{channels}",
              bytes_read=nbytes(sums, bn))


@pytest.mark.parametrize("channels", CHANNELS, ids="c{}".format)
def bench_update_running_stats(primitive, channels, device):
    running_mean, running_var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    stats = torch.stack((torch.randn(channels), torch.rand(channels) * COUNT)).to(device)
    primitive.in_place("update_running_stats", (running_mean, running_var, stats, COUNT, 0.1), changed=2,
                       case=f"c{channels}", bytes_read=nbytes(running_mean, running_var, stats))
