"""Second and higher derivatives, by differentiating plain-PyTorch formulas of the same functions.

First derivatives come from the fused kernels; a gradient of a gradient is rare enough to be recomputed from
the inputs.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.primitives.layout import acc_dtype
from resnet_fused.primitives.registration import without_autocast


def pre_activation(
    x: Tensor, gamma: Tensor, beta: Tensor, frozen: Tensor | None, eps: float, negative_slope: float
) -> Tensor:
    """act(bn(x)), differentiable any number of times. frozen: bn [4, C] whose mean and invstd are constants
    (evaluation mode); None: batch statistics, as functions of x."""
    acc = acc_dtype(x.dtype)
    xa, gamma, beta = x.to(acc), gamma.to(acc), beta.to(acc)
    if frozen is None:
        # Not F.batch_norm: its third derivative is wrong in torch 2.13 and refused in 2.15.
        centred = xa - xa.mean((0, 2, 3), keepdim=True)
        normalised = centred * torch.rsqrt(centred.square().mean((0, 2, 3), keepdim=True) + eps)
    else:
        mean, invstd = (t.view(1, -1, 1, 1) for t in (frozen[0], frozen[1]))
        normalised = (xa - mean) * invstd
    z = normalised * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
    a = F.relu(z) if negative_slope == 0 else F.leaky_relu(z, negative_slope)
    return a.to(x.dtype)


def convolution(
    a: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int
) -> Tensor:
    """The convolution of an activation, in its dtype."""
    bias = None if bias is None else bias.to(a.dtype)
    return F.conv2d(a, weight.to(a.dtype), bias, stride, padding, dilation, groups)


def vjp_of_vjp(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    cotangent: Tensor,
    second: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Differentiate g = vjp(function, inputs)(cotangent).

    Args:
        function: differentiable plain PyTorch.
        inputs: its arguments.
        cotangent: the gradient of its output.
        second: the cotangent of each component of g, None where there is none.

    Returns:
        the gradients of cotangent and of each input. They are differentiable again if grad mode is on
        (create_graph).
    """
    wanted = [i for i, s in enumerate(second) if s is not None]
    if not wanted:
        return None, [None] * len(inputs)
    create_graph = torch.is_grad_enabled()

    def variable(t: Tensor) -> Tensor:
        # An alias, so that a path from one input to another outside of function does not count here.
        return t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad(), without_autocast("cpu"), without_autocast("cuda"):
        arguments = [variable(t) for t in inputs]
        dout = variable(cotangent)
        out = function(*arguments)
        g = torch.autograd.grad(
            out, [arguments[i] for i in wanted], dout, create_graph=True, allow_unused=True
        )
        pairs = [
            (gi, second[i]) for gi, i in zip(g, wanted, strict=True) if gi is not None and gi.requires_grad
        ]
        if not pairs:
            return None, [None] * len(inputs)
        results = torch.autograd.grad(
            [gi for gi, _ in pairs],
            [dout, *arguments],
            [s.to(gi.dtype) for gi, s in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    return results[0], list(results[1:])
