"""Shows that the installed binaries work under the torch that runs this: `python tests/abi_smoke.py`, no pytest.

One binary serves every torch from the oldest supported to the newest; .ci/run starts this under two of them with
the same files. Every raw CPU operator and one training step of the public operators are compared with plain
PyTorch in float64.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import resnet_fused as rf
from resnet_fused import extension

SLOPE, EPS = 0.0, 1e-5
GEOMETRY = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)


def close(name, got, expected):
    expected = expected.to(got.dtype)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def raw_operators():
    """One preactivated 3x3 convolution, forward and backward, out of the library's own operators."""
    ops = torch.ops.resnet_fused_cpu
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def images(*size):
        return random(*size).contiguous(memory_format=torch.channels_last)

    x, dy, residual = images(2, 5, 6, 7), images(2, 3, 6, 7), images(2, 3, 6, 7)
    weight, bias, gamma, beta = random(3, 5, 3, 3), random(3), random(5), random(5)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, gamma, beta)]
    xr, wr, br, gr, sr = leaves
    a_ref = F.relu(F.batch_norm(xr, None, None, gr, sr, True, 0.1, EPS))
    y_ref = F.conv2d(a_ref, wr, br, padding=1) + residual
    y_ref.backward(dy)

    count = x.numel() // x.size(1)
    stats = ops.channel_stats(x)
    bn = ops.finalize_forward(stats, count, None, None, gamma, beta, EPS)
    y, y_stats = ops.preact_conv_forward(x, bn, weight, bias, residual, SLOPE, *GEOMETRY.values(), True)
    close("preact_conv_forward", y, y_ref.detach())
    close("its statistics", y_stats[0], y_ref.detach().mean((0, 2, 3)))
    dz, sums = ops.preact_conv_dgrad(dy, weight, x, bn, None, SLOPE, *GEOMETRY.values())
    coefficients = ops.finalize_backward(sums, bn, count, True)
    close("preact_apply", ops.preact_apply(dz, x, coefficients, None), xr.grad)
    close("dgamma", sums[1], gr.grad)
    close("dbeta", sums[0], sr.grad)
    dweight, dbias = ops.preact_conv_wgrad(dy, x, bn, weight, SLOPE, *GEOMETRY.values(), True)
    close("dweight", dweight, wr.grad)
    close("dbias", dbias, br.grad)

    a = ops.bn_act_forward(x, bn, SLOPE)
    close("bn_act_forward", F.conv2d(a, weight, bias, padding=1) + residual, y_ref.detach())
    da = torch.ops.aten.convolution_backward(
        dy, a, weight, [3], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])[0]
    close("bn_act_backward", ops.bn_act_backward(
        da.contiguous(memory_format=torch.channels_last), x, bn, None, SLOPE)[0], dz)
    means = ops.bn_act_pool_forward(x, bn, SLOPE)
    close("bn_act_pool_forward", means, a_ref.detach().mean((2, 3), keepdim=True))
    close("bn_act_pool_backward", ops.bn_act_pool_backward(means, x, bn, SLOPE)[0], ops.bn_act_backward(
        (means / 42).expand(x.shape).contiguous(memory_format=torch.channels_last), x, bn, None, SLOPE)[0])
    out, _ = ops.residual_add(dy, residual, None, None, 0.5, None, True)
    close("residual_add", out, dy + 0.5 * residual)

    windows = [3, 3], [2, 2], [1, 1]
    pooled, offsets = ops.max_pool_forward(x, *windows)
    xp = x.clone().requires_grad_()
    y_pooled = F.max_pool2d(xp, *windows)
    y_pooled.backward(pooled)
    close("max_pool_forward", pooled, y_pooled.detach())
    close("max_pool_backward", ops.max_pool_backward(pooled, offsets, x.shape[2:], *windows), xp.grad)

    running_mean, running_var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    ops.update_running_stats(running_mean, running_var, stats, count, 0.1)
    close("update_running_stats", running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


def public_operators():
    """A training step of the operators that users call, on every SIMD level of this CPU."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3, generator=generator) / 12
    gamma, beta = torch.rand(16, generator=generator) + 0.5, torch.randn(16, generator=generator)
    leaves = [t.clone().double().requires_grad_() for t in (x, weight, gamma, beta)]
    a = F.relu(F.batch_norm(leaves[0], None, None, leaves[2], leaves[3], True, 0.1, EPS))
    expected = F.conv2d(a, leaves[1], padding=1)
    expected.square().mean().backward()
    for level in range(len(extension.cpu_levels())):
        torch.ops.resnet_fused_cpu.set_simd_level(level)
        ours = [t.clone().requires_grad_() for t in (x, weight, gamma, beta)]
        y = rf.functional.preact_conv2d(
            ours[0], ours[2], ours[3], torch.zeros(16), torch.ones(16), ours[1], training=True, momentum=0.1,
            eps=EPS, stride=1, padding=1, dilation=1, groups=1)
        y.square().mean().backward()
        pairs = [(y.detach(), expected.detach())] + [(a.grad, b.grad) for a, b in zip(ours, leaves)]
        for got, want in pairs:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.ops.resnet_fused_cpu.set_simd_level(-1)


def main():
    if not extension.cpu_available():
        sys.exit(f"the CPU operator library did not load: {extension.failures}")
    raw_operators()
    public_operators()
    info = extension.build_info()
    print(f"built with torch {info['torch']}, runs under torch {torch.__version__}: "
          f"{Path(rf.__file__).parent}, {len(extension.cpu_levels())} SIMD levels")


if __name__ == "__main__":
    main()
