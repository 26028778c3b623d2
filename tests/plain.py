"""What the operators compute, written with torch.nn.functional: the plain PyTorch of the trust rule."""

import torch
import torch.nn.functional as F


def activated(x, norm, slope):
    """norm: (weight, bias, running_mean, running_var, training, momentum, eps)."""
    weight, bias, mean, var, training, momentum, eps = norm[:7]
    z = F.batch_norm(x, mean, var, weight, bias, training or mean is None, momentum, eps)
    return F.relu(z) if slope == 0 else F.leaky_relu(z, slope)


def preact_conv2d(x, norm, conv, slope=0.0, residual=None):
    """conv: (weight, bias, stride, padding, dilation, groups)."""
    y = F.conv2d(activated(x, norm, slope), *conv)
    return y if residual is None else y + residual


def residual_unit(x, norms, convs, shortcut=None, slope=0.0):
    a = activated(x, norms[0], slope)
    s = x if shortcut is None else F.conv2d(a, *shortcut)
    h = F.conv2d(a, *convs[0])
    for norm, conv in zip(norms[1:], convs[1:], strict=True):
        h = F.conv2d(activated(h, norm, slope), *conv)
    return h + s


def double(value):
    """value with every tensor in it a float64 copy that does not share memory; leaves keep requires_grad."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        items = [double(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def copy(value):
    """value with every tensor in it cloned; leaves keep requires_grad."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        items = [copy(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors(value):
    """All tensors in value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []
