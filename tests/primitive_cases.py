"""What the tests of the primitives share: shapes, arguments, and how each kind of result is judged."""

from typing import NamedTuple

import torch
from tolerances import STATS_EPS, assert_trusted

from resnet_fused.primitives import reference
from resnet_fused.primitives.layout import convolution_output_shape

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CL = torch.channels_last


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups


SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(1, 1, 5, 7, 1, (3, 3), padding=(1, 1)),
    Shape(2, 3, 9, 7, 16, (3, 3), padding=(1, 1)),
    Shape(3, 8, 6, 5, 17),
    Shape(2, 16, 8, 8, 16, (3, 3), padding=(1, 1)),
    Shape(2, 16, 7, 9, 35, (3, 3), (2, 2), (1, 1)),
    Shape(2, 17, 11, 5, 8, (1, 1), (2, 2)),
    Shape(1, 35, 13, 13, 65, (3, 3), padding=(1, 1)),
    Shape(2, 64, 9, 8, 64),
    Shape(1, 64, 10, 6, 64, (3, 3), padding=(1, 1)),
    Shape(2, 65, 5, 5, 130, (1, 1), (2, 2)),
    Shape(2, 65, 6, 6, 64, (3, 3), (2, 2), (1, 1)),
    Shape(5, 16, 4, 4, 16, (5, 5), padding=(2, 2)),
    Shape(2, 3, 12, 10, 8, (5, 3), (2, 1), (2, 0)),
    Shape(2, 8, 11, 12, 8, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Shape(1, 8, 12, 14, 16, (2, 4), (1, 2), (1, 3), (3, 1)),
    Shape(1, 16, 3, 3, 16, (3, 3)),
    Shape(1, 16, 3, 4, 8, (3, 3), (3, 3), (3, 3)),
    Shape(2, 130, 33, 4, 16),
    Shape(4, 16, 32, 32, 16, (3, 3), padding=(1, 1)),
    Shape(2, 16, 7, 7, 32, (3, 3), padding=(1, 1), groups=4),
    Shape(2, 12, 5, 6, 12, (3, 3), (2, 2), (1, 1), groups=12),
]
ELEMENTWISE_SHAPES = [
    (1, 1, 1, 2),
    (2, 3, 5, 7),
    (1, 8, 4, 4),
    (3, 17, 9, 5),
    (2, 35, 3, 3),
    (2, 64, 16, 15),
    (1, 65, 7, 1),
]


def name_of(value):
    if isinstance(value, Shape):
        extra = f"g{value.groups}" if value.groups > 1 else ""
        return (
            f"{value.n}x{value.c}x{value.h}x{value.w}-k{value.k}-{value.kernel[0]}x{value.kernel[1]}"
            f"s{value.stride[0]}{value.stride[1]}p{value.padding[0]}{value.padding[1]}"
            f"d{value.dilation[0]}{value.dilation[1]}{extra}"
        )
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def identity_bn(c, dtype=torch.float32):
    """Rows of BatchNorm that leave x as it is; dtype: of x."""
    return torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=acc(dtype)).view(4, 1).expand(4, c).contiguous()


def tensors(shape, dtype, make):
    """x, the weight and dy; make(*size) fills them."""
    x = make(shape.n, shape.c, shape.h, shape.w).to(dtype).contiguous(memory_format=CL)
    weight = make(shape.k, shape.c // shape.groups, *shape.kernel).to(dtype)
    size = convolution_output_shape(x.shape, weight.shape, *shape.geometry[:3])
    return x, weight, make(*size).to(dtype).contiguous(memory_format=CL)


def gradients(dy, a, weight, shape):
    """dx and dweight of the plain convolution."""
    return torch.ops.aten.convolution_backward(
        dy, a, weight, None, *shape.geometry[:3], False, [0, 0], 1, [True, True, False]
    )[:2]


def activation(*size, dtype):
    return torch.randn(size).to(dtype).contiguous(memory_format=CL)


def bn_rows(c, dtype):
    """A BatchNorm's coefficients, some scales negative."""
    mean, var = torch.randn(c).double() * 0.3, torch.rand(c).double() + 0.5
    return reference.finalize_forward(None, 0, mean, var, torch.randn(c), torch.randn(c), 1e-5).to(acc(dtype))


def to_tf32(t):
    """Rounded as cvt.rna.tf32 does: to 10 bits of mantissa, ties away from zero."""
    bits = t.contiguous(memory_format=CL).view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


def wide(*tensors):
    return tuple(t.double() if isinstance(t, torch.Tensor) else t for t in tensors)


def check_activation(name, result, yardstick, oracle, terms=0.0):
    """One activation-sized output: dtype, layout and the trust rule. terms: of its sums, in float64
    (SUM_EPS).
    """
    assert result.dtype == yardstick.dtype, name
    assert result.stride() == torch.empty(result.shape, memory_format=CL).stride(), name
    assert_trusted(result, yardstick, oracle, name, terms if result.dtype == torch.float64 else 0.0)


def check_stats(stats, y):
    """stats are those of y as rounded."""
    oracle, count = reference.channel_stats(y.double()), y.numel() // y.shape[1]
    assert stats.dtype == acc(y.dtype) and stats.shape == oracle.shape
    eps = torch.finfo(stats.dtype).eps
    spread = (oracle[1] / count).sqrt() + oracle[0].abs()
    assert ((stats[0] - oracle[0]).abs() <= STATS_EPS * eps * spread).all(), "mean"
    # Each deviation carries the rounding of x - mean.
    assert ((stats[1] - oracle[1]).abs() <= STATS_EPS * eps * (oracle[1] + spread**2)).all(), "M2"


def check_sums(sums, dz, x, bn):
    """sums are those of dz as rounded."""
    d, xhat = dz.double(), (x.double() - bn[0].double().view(1, -1, 1, 1)) * bn[1].double().view(1, -1, 1, 1)
    terms = torch.stack((d.abs().sum((0, 2, 3)), (d * xhat).abs().sum((0, 2, 3))))
    oracle = torch.stack((d.sum((0, 2, 3)), (d * xhat).sum((0, 2, 3))))
    same = dz.to(sums.dtype)
    plain_xhat = (x.to(sums.dtype) - bn[0].view(1, -1, 1, 1)) * bn[1].view(1, -1, 1, 1)
    plain = torch.stack((same.sum((0, 2, 3)), (same * plain_xhat).sum((0, 2, 3))))
    assert_trusted(sums, plain, oracle, "sums", terms)


def with_value(n, c, h, w, value):
    def put(x):
        x = x.clone()
        x[n, c, h, w] = value
        return x

    return put


#: Changes of x that statistics and sums have to bear.
SPECIAL = {
    "mean 1e4": lambda x: x + 1e4,
    "mean 1e6": lambda x: x + 1e6,
    "1e30": lambda x: x * 1e30,
    "constant channel": lambda x: torch.where(torch.arange(x.shape[1]).view(1, -1, 1, 1) == 1, 2.5, x),
    "denormals": lambda x: x * 1e-39,
    "NaN inside": with_value(0, 2, 3, 3, torch.nan),
    "NaN in a corner": with_value(1, 0, 0, 0, torch.nan),
    "inf inside": with_value(0, 2, 3, 3, torch.inf),
    "-inf on the border": with_value(1, 1, 0, 4, -torch.inf),
}
