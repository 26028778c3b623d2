"""What the layers in a user's model are: norms, activations, convolutions, and layers that may do nothing.

Every question is answered by a module's class and state, never by its name in the model. Classes of timm and
torchvision are recognised if the caller's program has imported them; neither is imported here.
"""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..nn.units import calls_forward_alone, has_hooks, plain_forward

__all__ = [
    "activation_slope",
    "conv_refusal",
    "is_norm",
    "leaf_state",
    "norm_refusal",
    "norm_slope",
    "passes_through",
    "per_image_gate",
]

#: Classes of other packages: (module, name).
_BATCH_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")
_GATES = (("timm.layers.drop", "DropPath"), ("torchvision.ops.stochastic_depth", "StochasticDepth"))
_OTHER_NORMS = (
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
)


_NORMS_WITH_ACT = ("BatchNormAct2d", "FrozenBatchNormAct2d", "SyncBatchNormAct", "GroupNormAct")
#: timm's modules of norms that activate their result themselves, in a way of their own.
_OTHER_NORM_ACTS = ("timm.layers.evo_norm", "timm.layers.filter_response_norm", "timm.layers.inplace_abn")


def _imported(where: tuple[str, str]) -> type | None:
    return getattr(sys.modules.get(where[0]), where[1], None)


def _is_exactly(module: nn.Module, *where: tuple[str, str]) -> bool:
    return any(type(module) is _imported(name) for name in where)


def _own_parameters(module: nn.Module) -> bool:
    """Whether weight and bias are parameters, not computed by a parametrization or an older weight norm."""
    return {"weight", "bias"} <= module._parameters.keys()


def is_norm(module: nn.Module) -> bool:
    """Whether module normalises, in a way that the fused operators know or not."""
    others = [kind for kind in map(_imported, _OTHER_NORMS) if kind is not None]
    if type(module).__module__ in _OTHER_NORM_ACTS:
        return True
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, *others)
    return isinstance(module, kinds) and not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d))


def norm_refusal(module: nn.Module) -> str | None:
    """Why a norm is not what the fused operators compute, or None."""
    name = type(module).__name__
    if isinstance(module, nn.SyncBatchNorm):
        return f"{name} takes statistics across processes"
    if not isinstance(module, nn.BatchNorm2d):
        return f"{name} is not a BatchNorm2d"
    if has_hooks(module):
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"the forward of this {name} has been replaced"
    if not _own_parameters(module):
        return f"{name} has computed parameters"
    if _is_exactly(module, _BATCH_NORM_ACT):
        for child in (module.drop, module.act):
            if has_hooks(child):
                return f"a layer inside {name} has hooks"
        if type(module.drop) is not nn.Identity:
            return f"{name} drops with {type(module.drop).__name__}"
        if type(module.act) is not nn.Identity and activation_slope(module.act) is None:
            return f"{name} activates with {type(module.act).__name__}"
        return None
    if type(module).forward is not _BatchNorm.forward:
        return f"{name} has a forward of its own"
    if type(module)._check_input_dim is not nn.BatchNorm2d._check_input_dim:
        return f"{name} checks its input in a way of its own"
    return None


def norm_slope(module: nn.Module) -> float | None:
    """The slope of the activation that a norm applies itself; None: it applies none."""
    if type(module).__module__ in _OTHER_NORM_ACTS:
        return 0.0  # such a norm is refused in any case
    act = getattr(module, "act", None)
    if isinstance(act, nn.Module) and type(module).__name__ in _NORMS_WITH_ACT:
        return activation_slope(act)
    return None


def activation_slope(module: nn.Module) -> float | None:
    """0 for ReLU, its slope for LeakyReLU, None for everything else."""
    if not calls_forward_alone(module):
        return None
    if type(module) is nn.ReLU:
        return 0.0
    if type(module) is nn.LeakyReLU and module.negative_slope >= 0:
        return float(module.negative_slope)
    return None


def conv_refusal(module: nn.Module) -> str | None:
    """Why a convolution is not what the fused operators compute, or None."""
    name = type(module).__name__
    if has_hooks(module):
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"the forward of this {name} has been replaced"
    if not _own_parameters(module):
        return f"{name} has a computed weight"
    if (
        plain_forward(module) is not nn.Conv2d.forward
        or type(module)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return f"{name} has a forward of its own"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return None


def passes_through(module: nn.Module) -> bool:
    """Whether module returns its input as it is, in its present state."""
    if not calls_forward_alone(module):
        return False
    if type(module) is nn.Identity:
        return True
    if type(module) in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        return not module.training or (module.p == 0.0 and not module.inplace)
    if _is_exactly(module, _GATES[0]):
        return not module.training or module.drop_prob == 0.0
    if _is_exactly(module, _GATES[1]):
        return not module.training or module.p == 0.0
    return False


def per_image_gate(module: nn.Module) -> bool:
    """Whether module multiplies each image by a random number: stochastic depth."""
    if not calls_forward_alone(module):
        return False
    return _is_exactly(module, _GATES[0]) or (_is_exactly(module, _GATES[1]) and module.mode == "row")


def leaf_state(module: nn.Module) -> tuple:
    """What a plan assumes about a layer: if this changes, the plan has to be made anew."""
    # Called for every layer at every call: no lookups that nn.Module.__getattr__ would have to answer.
    kind, values = type(module), module.__dict__
    hooked, replaced = has_hooks(module), "forward" in values
    if isinstance(module, nn.Conv2d):
        own = _own_parameters(module)
        return (kind, hooked, replaced, own, values["padding_mode"], values["padding"], values["dilation"],
                values["groups"])  # fmt: skip
    if isinstance(module, _BatchNorm):
        inner = [leaf_state(child) for child in module._modules.values()]
        return (kind, hooked, replaced, _own_parameters(module), inner)
    return (kind, hooked, replaced, values["training"], values.get("inplace"), values.get("negative_slope"),
            values.get("p"), values.get("drop_prob"))  # fmt: skip
