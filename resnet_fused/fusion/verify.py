"""``verify``: does the fused model compute what the plain one computes, for this input?

The trust rule: against a float64 run, error(fused) <= 2 x error(plain, same dtype) + 2 ulp. A deep net
amplifies every rounding, so the error of a single run of plain PyTorch is a matter of luck. The yardstick is
therefore the greatest of several plain runs: of the input, and of inputs that differ from it by one rounding.
In float32, what the ReLUs' derivatives may do where a pre-activation is within rounding of 0 is added
(:mod:`.doubt`). That leaves room for an error of its size, so the fused model runs in float64 too, where
nothing is in doubt and only rounding may differ. Errors are Euclidean norms relative to the norm of each
tensor, and their root mean square over the tensors of a kind.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .classes import is_fused
from .doubt import UncertainSigns, every_relu
from .fuse import fuse, unfuse

__all__ = ["Kind", "Verification", "verify"]

_FACTOR, _ULPS = 2.0, 2.0
#: float64 against float64: a rounding of 1e-16, with room for a net that amplifies it by 1e8.
_FLOAT64 = 1e-8
_NUDGES = 3  # plain runs with an input that differs by a rounding
#: A tensor whose elements are this small beside the largest of its kind is noise, such as the gradient of a
#: bias in front of a norm, which is 0: its error is taken relative to this instead.
_FLOOR = 1e-4


@dataclass
class Kind:
    """One kind of results.

    Attributes:
        name: "outputs", "input gradients", "parameter gradients" or "running statistics".
        tensors: how many there are.
        error, plain: relative to float64, of the fused model and of the plain one.
        doubt: what signs of pre-activations that are within rounding of 0 can change.
        allowed: 2 x (plain + doubt) + 2 ulp.
        float64: error of the fused model run in float64; at most 1e-8 is allowed.
        worst: the tensor with the largest error of the fused model.
        worst_error: that.
    """

    name: str
    tensors: int
    error: float
    plain: float
    doubt: float
    allowed: float
    float64: float
    worst: str
    worst_error: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed and self.float64 <= _FLOAT64  # not if NaN

    @property
    def ratio(self) -> float:
        """error(fused) / (error(plain) + doubt)."""
        if self.plain + self.doubt > 0:
            return self.error / (self.plain + self.doubt)
        return 0.0 if self.error == 0 else math.inf


@dataclass
class Verification:
    """The outcome of :func:`verify`; true if all is well.

    Attributes:
        training: the mode that was verified.
        units: fused units.
        kinds: by kind of results.
        failing_units: names of the fused units that fail on their own, for the inputs that they get.
    """

    training: bool
    units: int
    kinds: list[Kind]
    failing_units: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(kind.ok for kind in self.kinds)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def ratio(self) -> float:
        """The largest error(fused) / (error(plain) + doubt) of any kind."""
        return max(kind.ratio for kind in self.kinds)

    def as_dict(self) -> dict[str, Any]:
        kinds = [asdict(kind) | {"ok": kind.ok, "ratio": kind.ratio} for kind in self.kinds]
        return asdict(self) | {"ok": self.ok, "ratio": self.ratio, "kinds": kinds}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        lines = [
            f"{'verified' if self.ok else 'WRONG'}: {self.units} fused units, {mode} mode",
            f"  {'':20} {'fused':>8} {'plain':>8} {'doubt':>8} {'allowed':>8} {'float64':>8}  ratio",
        ]
        for kind in self.kinds:
            lines.append(
                f"  {kind.name:20} {kind.error:8.1e} {kind.plain:8.1e} {kind.doubt:8.1e} {kind.allowed:8.1e}"
                f" {kind.float64:8.1e} {kind.ratio:6.2f}"
                + ("" if kind.ok else " !")
            )
            if not kind.ok:
                lines.append(f"    largest: {kind.worst} ({kind.worst_error:.1e})")
        if not self.ok:
            names = ", ".join(self.failing_units) or "none: their roundings add up in the whole model"
            lines.append(f"  units that fail on their own: {names}")
        return "\n".join(lines)


def verify(model: nn.Module, x: Tensor | tuple[Any, ...], *, seed: int = 0) -> Verification:
    """Compare a model, fused, with itself as it was written, in its present mode.

    Copies of the model run forward and backward, fused, plain, and plain in float64; the model, its
    gradients, statistics and the random state stay as they are.

    Args:
        model: fused or not; an unfused one is verified as :func:`fuse` would make it.
        x: the input, or a tuple of the arguments. Its dtype is that of the comparison.
        seed: of the random numbers that the model draws (dropout, stochastic depth) and of the cotangents.

    Returns:
        a :class:`Verification`.

    Raises:
        RuntimeError: the model has tensors that cannot be copied, or no floating-point output.
    """
    args = x if isinstance(x, tuple) else (x,)
    with torch.random.fork_rng(devices=_devices(args)):
        plain = _copy(model)
        fused = _copy(model)
        if not any(map(is_fused, fused.modules())):
            fuse(fused, memory_format=None)
        unfuse_classes(plain)
        kinds = _compare(fused, plain, args, seed)
        result = Verification(model.training, sum(map(is_fused, fused.modules())), kinds)
        if not result.ok:
            result.failing_units = _failing_units(model, fused, args, seed)
    return result


def unfuse_classes(model: nn.Module) -> nn.Module:
    """unfuse, with the memory format left as it is."""
    for module in model.modules():
        module.__dict__.pop("_resnet_fused_strides", None)
    return unfuse(model)


def _devices(args: tuple) -> list[torch.device]:
    return [a.device for a in args if isinstance(a, Tensor) and a.device.type == "cuda"][:1]


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(f"verify works on copies, but the model cannot be copied: {error}") from error


def _compare(fused: nn.Module, plain: nn.Module, args: tuple, seed: int) -> list[Kind]:
    pre_activations: list[Tensor] = []
    with every_relu(lambda index, z, slope: pre_activations.append(z.detach().float())):
        exact = _results(_copy(plain).double(), _cast(args, torch.float64), seed)
    dtypes = [a.dtype for a in args if _is_float(a)]
    doubts = {}
    if all(dtype is torch.float32 for dtype in dtypes):
        doubts = _doubts(_copy(plain), args, seed, pre_activations)
    del pre_activations
    theirs = [_results(_copy(plain), args, seed)]
    for nudge in range(_NUDGES):
        theirs.append(_results(_copy(plain), _nudged(args, seed + nudge), seed))
    mine = _results(_copy(fused), args, seed)
    mine64 = _results(_copy(fused).double(), _cast(args, torch.float64), seed)
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
    kinds = []
    for name, expected in exact.items():
        if not expected:
            continue
        error, worst, worst_error = _error(mine[name], expected)
        yardstick = max(_error(other[name], expected)[0] for other in theirs)
        doubt = 0.0
        if name in doubts:
            one, other = doubts[name]
            # _error wants results: those of the float64 run with the difference added.
            shifted = {k: v + other[k] - one[k] for k, v in expected.items() if k in one}
            doubt = _error(shifted, expected)[0]
        float64, worst64, _ = _error(mine64[name], expected)
        worst = worst if float64 <= _FLOAT64 else worst64
        allowed = _FACTOR * (yardstick + doubt) + _ULPS * eps
        kinds.append(Kind(name, len(expected), error, yardstick, doubt, allowed, float64, worst, worst_error))
    return kinds


def _doubts(plain: nn.Module, args: tuple, seed: int, pre_activations: list[Tensor]) -> dict:
    """Kind of gradients -> (gradients, the same with every uncertain derivative of a ReLU reversed).

    Empty where the model cannot run like that, as where it checkpoints.
    """
    signs = UncertainSigns(pre_activations)
    try:
        with every_relu(signs.relu):
            ordinary = _results(plain, args, seed)
        signs.reverse = True
        with every_relu(signs.relu):
            reversed_ = _results(plain, args, seed)
    except Exception:  # of the user's code, which runs without this
        return {}
    return {name: (ordinary[name], reversed_[name]) for name in ("input gradients", "parameter gradients")}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if _is_float(a) else a for a in args)


def _nudged(args: tuple, seed: int) -> tuple:
    """The arguments, each number off by up to one rounding."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(a: Tensor) -> Tensor:
        noise = torch.rand(a.shape, generator=generator, dtype=torch.float64).to(a.device) * 2 - 1
        return (a.double() * (1 + noise * torch.finfo(a.dtype).eps)).to(a.dtype)

    return tuple(nudge(a) if _is_float(a) else a for a in args)


def _error(results: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str, float]:
    """Root mean square of the relative errors, and the tensor with the largest."""
    rms = {k: float(v.norm()) / math.sqrt(max(v.numel(), 1)) for k, v in exact.items()}
    floor = _FLOOR * max(rms.values(), default=0.0)
    total, worst, largest = 0.0, "", -1.0
    for name, value in exact.items():
        other = results.get(name)
        if other is None or other.shape != value.shape:
            return math.inf, name, math.inf
        scale = max(rms[name], floor) * math.sqrt(max(value.numel(), 1))
        difference = float((other.double() - value).norm())
        error = difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
        total += error * error
        if not error <= largest:
            worst, largest = name, error
    return math.sqrt(total / max(len(exact), 1)), worst, largest


def _results(model: nn.Module, args: tuple, seed: int) -> dict[str, dict[str, Tensor]]:
    """What a model computes for its arguments, forward and backward, by kind."""
    torch.manual_seed(seed)
    args = tuple(
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_() if _is_float(a) else a
        for a in args
    )
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        outputs = _tensors_in(model(*args))
    if not outputs:
        raise RuntimeError("verify needs a model that returns floating-point tensors")
    generator = torch.Generator().manual_seed(seed)
    with_gradient, cotangents = [], []
    for y in outputs.values():
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        if y.requires_grad:
            with_gradient.append(y)
            cotangents.append(cotangent)
    if with_gradient:
        torch.autograd.backward(with_gradient, cotangents)

    def double(named):
        return {name: t.detach().double().cpu() for name, t in named if t is not None}

    return {
        "outputs": double(outputs.items()),
        "input gradients": double((f"argument {i}", a.grad) for i, a in enumerate(args) if _is_float(a)),
        "parameter gradients": double((name, p.grad) for name, p in model.named_parameters()),
        "running statistics": double((name, b) for name, b in model.named_buffers() if _is_float(b)),
    }


def _tensors_in(value: Any, name: str = "output") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, (list, tuple)) else ())  # fmt: skip
    return {k: v for i, part in items for k, v in _tensors_in(part, f"{name}[{i}]").items()}


def _failing_units(model: nn.Module, fused: nn.Module, args: tuple, seed: int) -> list[str]:
    """Units that break the rule on their own, for the inputs that they get in the plain model."""
    names = [name for name, module in fused.named_modules() if is_fused(module)]
    plain = unfuse_classes(_copy(model))
    inputs: dict[str, tuple] = {}
    for name, module in plain.named_modules():
        if name in names:
            module.register_forward_pre_hook(
                lambda _, given, name=name: inputs.setdefault(name, given) and None
            )
    torch.manual_seed(seed)
    with torch.no_grad():
        plain(*args)
    failing = []
    units, twins = dict(fused.named_modules()), dict(unfuse_classes(_copy(model)).named_modules())
    for name in names:
        given = inputs.get(name, ())
        if given and all(isinstance(a, Tensor) for a in given):
            if not all(kind.ok for kind in _compare(units[name], twins[name], given, seed)):
                failing.append(name)
    return failing
