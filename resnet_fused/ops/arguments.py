"""The public functions' arguments, brought to the form of the operators' schemas."""

from typing import NamedTuple

import torch
from torch import Tensor


class BatchNormArgs(NamedTuple):
    """What one BatchNorm2d of a unit passes, read at call time.

    Attributes:
        weight, bias: [C], or None (``affine=False``).
        running_mean, running_var: [C], or None (``track_running_stats=False``); updated in place in training.
        training: use batch statistics; they are used too where there are no running ones.
        momentum: the factor of the exponential average: a float, or a 0-dim tensor (such as 1 /
            num_batches_tracked, for the cumulative average of ``momentum=None``, without a synchronisation).
        eps: added to the variance.
        num_batches_tracked: int64, one element: residual_unit adds 1 to it. None: the caller has counted.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = False
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None


class ConvArgs(NamedTuple):
    """What one Conv2d of a unit passes: weight [K, C/groups, R, S], bias [K] or None, conv2d's options."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            return (value[0], value[0])
        if len(value) != 2:
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of 2 values to match the "
                f"convolution dimensions, but got {name}={list(value)}"
            )
        return (value[0], value[1])
    return (value, value)


def pooling_pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """An option of a pooling, with max_pool2d's errors."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for number in values:
        if not isinstance(number, (int, torch.SymInt)):
            kind = type(number).__name__
            raise TypeError(f"max_pool2d(): argument '{name}' must be tuple of ints, not {kind}")
    if len(values) not in (1, 2):
        may_be = "be omitted, a single int" if name == "stride" else "be a single int"
        raise RuntimeError(f"max_pool2d: {name} must either {may_be}, or a tuple of two ints")
    return (values[0], values[-1])


def resolve_padding(padding, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]):
    """Padding as a pair, and how many leading rows and columns of the output to drop.

    'same' pads the left by total // 2 and the right by the rest. Where total is odd (an even kernel), both
    sides are padded by the larger half here, and the first row or column of the output is not part of the
    result.
    """
    if not isinstance(padding, str):
        return pair(padding, "padding"), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    if stride != (1, 1):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    if weight.dim() != 4:
        return (0, 0), (0, 0)  # the operator's own check says what is wrong
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return tuple((t + 1) // 2 for t in total), tuple(t % 2 for t in total)
