"""How signals and gradients propagate through a net of residual units: equations 3 to 9, measured.

He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual Networks" (ECCV 2016, arXiv:1603.05027). A unit is
y_l = h(x_l) + F(x_l), x_{l+1} = f(y_l) (equations 1 and 2). With h and f identities (equation 3)

- x_L = x_l + sum_{i=l}^{L-1} F(x_i) (equation 4),
- dE/dx_l = dE/dx_L (1 + d/dx_l sum_{i=l}^{L-1} F(x_i)) (equation 5): a direct term with the coefficient 1,
  and the rest.

With h(x_l) = k_l x_l (equation 6) the product of the k takes the place of 1 in both (equations 7 and 8);
gates are k = 1 - g, dropout is k = mask / (1 - p). Pre-activation units have f = identity and activate x for
F alone (equation 9). Original units have f = ReLU: the paper's argument leaves it out; here it is measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .observed_units import ObservedUnit, observe
from .shortcut_sum import ShortcutSum, ulp_of_largest

__all__ = ["Propagation", "StagePropagation", "UnitPropagation", "measure_propagation"]


@dataclass(frozen=True)
class UnitPropagation:
    """Unit l, seen from L, the end of its stage.

    The last one of a net is the head's input, which has x and its gradient alone. None where there is no such
    number. rms, mean and variance are over all elements; norms are Euclidean.

    Attributes:
        unit: l, counted from 0 through the whole net.
        name: as in ``net.residual_units()``; "head" for the last.
        stage: index of the :class:`StagePropagation` to which the unit belongs; None where the unit changes
            dimensions.
        channels, height, width: of x_l.
        signal_rms, signal_mean, signal_variance: of x_l.
        shortcut_rms, residual_rms: of h(x_l) and F(x_l), the terms of the addition.
        factor_mean, factor_std: of k_l.
        product_mean, product_std: of k_l k_{l+1} ... k_{L-1}, multiplied element by element (equations 7 and
            8).
        coefficient_mean, coefficient_std: of the coefficient of dE/dx_L in dE/dx_l, by a vector-Jacobian
            product of ones through the shortcuts alone. By equations 5 and 8 it is the product.
        direct_mean, direct_std: the same through f, where f acts on each element for itself.
        gradient_norm: of dE/dx_l, E the mean cross-entropy of the batch.
        direct_norm, rest_norm: of the two terms of dE/dx_l, from L on: what comes by the shortcuts (and f)
            alone, and all that passes weights.
        direct_ratio: direct_norm / norm of dE/dx_L.
        split_error: norm of dE/dx_l - direct - rest, over gradient_norm: rounding alone.
    """

    unit: int
    name: str
    stage: int | None
    channels: int
    height: int
    width: int
    signal_rms: float
    signal_mean: float
    signal_variance: float
    shortcut_rms: float | None = None
    residual_rms: float | None = None
    factor_mean: float | None = None
    factor_std: float | None = None
    product_mean: float | None = None
    product_std: float | None = None
    coefficient_mean: float | None = None
    coefficient_std: float | None = None
    direct_mean: float | None = None
    direct_std: float | None = None
    gradient_norm: float | None = None
    direct_norm: float | None = None
    rest_norm: float | None = None
    direct_ratio: float | None = None
    split_error: float | None = None


@dataclass(frozen=True)
class StagePropagation:
    """The equations over units l to L - 1, all that follow one another without a change of dimensions.

    Attributes:
        stage: index.
        first, last: names of the units l and L - 1.
        begin, end: l and L.
        deviation: norm of x_L - (prod k * x_l + sum F) over the norm of x_L (equations 4 and 7). The right
            side is computed to twice the precision from the F and k of the net. None where the shortcuts are
            no factors.
        deviation_ulp: its largest element in units in the last place of the largest of x_L.
        rounding_ratio: the largest deviation of an element over what its L - l additions (and products) can
            have lost by rounding, half an ulp each: at most 1 where the equation holds exactly. More is what
            f has changed.
        product: prod k, where all k are numbers.
        product_mean, product_std: of prod k, element by element.
        coefficient_error: the largest difference of an element of the measured coefficient of the direct term
            from prod k, over the largest of prod k (equations 5 and 8).
        split_error: the largest of the units.
    """

    stage: int
    first: str
    last: str
    begin: int
    end: int
    deviation: float | None = None
    deviation_ulp: float | None = None
    rounding_ratio: float | None = None
    product: float | None = None
    product_mean: float | None = None
    product_std: float | None = None
    coefficient_error: float | None = None
    split_error: float | None = None

    @property
    def exact(self) -> bool | None:
        """Whether equation 4 (or 7) holds to rounding."""
        return None if self.rounding_ratio is None else self.rounding_ratio <= 1.0


@dataclass(frozen=True)
class Propagation:
    """What one forward and one backward showed.

    Attributes:
        loss: E, the mean cross-entropy.
        dtype: of the net: float32 or float64.
        units: one of each unit, in order, and one of the head's input.
        stages: the stretches of units without a change of dimensions.
    """

    loss: float
    dtype: torch.dtype
    units: list[UnitPropagation]
    stages: list[StagePropagation]


def measure_propagation(net: nn.Module, images: Tensor, labels: Tensor, *, seed: int = 0) -> Propagation:
    """Measure one forward and one backward of a net, in the mode it is in; parameters, ``grad`` and buffers
    stay as they were.

    Works with every net that has ``residual_units()`` and plain units: original and pre-activation, every
    shortcut, wide and plain nets. Time is about that of two training steps; only numbers are kept.

    Args:
        net: a plain net (``fused=False``), float32 or float64.
        images: (N, C, H, W), in the dtype and on the device of the net.
        labels: int64, (N,).
        seed: of what is drawn at random (dropout), so that snapshots of one net can be compared. The caller's
            random state is left alone.

    Raises:
        TypeError: the net has no ``residual_units()``, or another dtype.
        ValueError: a fused net.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"measure_propagation: expected float32 or float64 images, but got {images.dtype}")
    devices = [images.device] if images.is_cuda else []
    with _buffers_kept(net), torch.random.fork_rng(devices), torch.enable_grad(), observe(net) as found:
        torch.manual_seed(seed)
        loss = F.cross_entropy(net(images), labels)
        if not found:
            raise TypeError(f"expected a net of residual units, but {type(net).__name__} ran none")
        stages = _stages(found)
        forward = [_forward(index, found, stages) for index in range(len(found))]
        forward_stages = [_sum_of_residuals(stage, found) for stage in stages]
        head = found[-1].out
        (gradient,) = torch.autograd.grad(loss, head)
        last = replace(_signal(len(found), "head", None, head), gradient_norm=_norm(gradient))
        backward, errors = _backward(found, stages, forward, gradient)
    stages = [
        replace(
            stage,
            coefficient_error=errors.get(stage.stage),
            split_error=max(
                (u.split_error for u in backward if u.stage == stage.stage), default=None, key=_nan_is_largest
            ),
        )
        for stage in forward_stages
    ]
    return Propagation(float(loss.detach()), images.dtype, [*backward, last], stages)


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


@contextlib.contextmanager
def _buffers_kept(net: nn.Module) -> Iterator[None]:
    """Running statistics are put back: looking at a net does not train it."""
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(before[name])


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf if a > 0 else math.nan)


def _mean_std(x: Tensor | float | None) -> tuple[float | None, float | None]:
    if x is None or isinstance(x, float):
        return x, None if x is None else 0.0
    variance, mean = torch.var_mean(x.detach().double(), correction=0)
    return float(mean), float(variance.sqrt())


def _stages(found: list[ObservedUnit]) -> list[StagePropagation]:
    stages: list[StagePropagation] = []
    begin = 0
    for index in range(len(found) + 1):
        if index < len(found) and found[index].keeps_shape:
            continue
        if begin < index:
            stages.append(
                StagePropagation(len(stages), found[begin].name, found[index - 1].name, begin, index)
            )
        begin = index + 1
    return stages


def _signal(index: int, name: str, stage: int | None, x: Tensor) -> UnitPropagation:
    variance, mean = torch.var_mean(x.detach().double(), correction=0)
    rms = _norm(x) / math.sqrt(x.numel())
    return UnitPropagation(index, name, stage, *x.shape[1:], rms, float(mean), float(variance))


def _forward(index: int, found: list[ObservedUnit], stages: list[StagePropagation]) -> UnitPropagation:
    unit = found[index]
    stage = next((s.stage for s in stages if s.begin <= index < s.end), None)
    elements = math.sqrt(unit.residual.numel())
    mean, std = _mean_std(unit.factor)
    return replace(
        _signal(index, unit.name, stage, unit.x),
        factor_mean=mean,
        factor_std=std,
        shortcut_rms=_norm(unit.shortcut) / elements,
        residual_rms=_norm(unit.residual) / elements,
    )


def _product(factors: list[float | Tensor | None]) -> float | Tensor | None:
    if any(factor is None for factor in factors):
        return None
    product: float | Tensor = 1.0
    for factor in factors:
        product = factor * product
    return product


@torch.no_grad()
def _sum_of_residuals(stage: StagePropagation, found: list[ObservedUnit]) -> StagePropagation:
    """Equations 4 and 7."""
    members = found[stage.begin : stage.end]
    product = _product([unit.factor for unit in members])
    if product is None:
        return stage
    total = ShortcutSum(members[0].x)
    for unit in members:
        total.add(unit.factor, unit.residual, unit.shortcut, unit.addition)
    end = members[-1].out
    deviation = total.deviation(end).abs()
    bound = total.bound()
    over = torch.where(deviation == 0, 0.0, deviation.double() / bound)
    mean, std = _mean_std(product)
    return replace(
        stage,
        deviation=_ratio(_norm(deviation), _norm(end)),
        deviation_ulp=_ratio(float(deviation.max()), ulp_of_largest(end)),
        rounding_ratio=float(over.max()),
        product=product if isinstance(product, float) else None,
        product_mean=mean,
        product_std=std,
    )


class _FromTheEnd:
    """What runs back from L: the two terms of the gradient, the coefficient of the direct one, the product of
    the factors.
    """

    def __init__(self, gradient: Tensor) -> None:
        self.norm = _norm(gradient)
        self.direct, self.rest = gradient, torch.zeros_like(gradient)
        self.coefficient: Tensor | None = torch.ones_like(gradient)  # by shortcuts, f left out
        self.with_after: Tensor | None = torch.ones_like(gradient)  # by shortcuts and f
        self.product: float | Tensor | None = 1.0

    def step(self, unit: ObservedUnit, gradient: Tensor) -> None:
        """From x_{l+1} to x_l; ``gradient`` is dE/dx_{l+1}."""
        self.direct = unit.through_shortcut(unit.through_after(self.direct))
        rest = unit.through_shortcut(unit.through_after(self.rest))
        self.rest = rest + unit.through_residual(unit.through_after(gradient))
        known = unit.factor is not None and self.product is not None
        self.product = unit.factor * self.product if known else None
        self.coefficient = unit.through_shortcut(self.coefficient) if known else None
        if not known or not unit.elementwise_after:
            self.with_after = None
        if self.with_after is not None:
            self.with_after = unit.through_shortcut(unit.through_after(self.with_after))

    def coefficient_error(self) -> float | None:
        """Against the product, relative to its largest element."""
        if self.product is None:
            return None
        product = torch.as_tensor(self.product, dtype=torch.float64, device=self.direct.device)
        difference = float((self.coefficient.double() - product).abs().max())
        return _ratio(difference, float(product.abs().max()))


def _backward(
    found: list[ObservedUnit], stages: list[StagePropagation], units: list[UnitPropagation], gradient: Tensor
) -> tuple[list[UnitPropagation], dict[int, float | None]]:
    """Equations 5 and 8, unit by unit from the last; each unit's graph is given up when it is done."""
    ends = {stage.end - 1 for stage in stages}
    done: list[UnitPropagation] = []
    errors: dict[int, float | None] = {}
    sofar: _FromTheEnd | None = None
    for index in range(len(found) - 1, -1, -1):
        unit, row = found.pop(), units[index]
        whole = unit.through(gradient)
        if row.stage is None:
            sofar = None
        elif index in ends:
            sofar = _FromTheEnd(gradient)
        if sofar is not None:
            sofar.step(unit, gradient)
            row = replace(row, **_terms(sofar, whole))
            errors[row.stage] = sofar.coefficient_error()
        gradient = whole
        done.append(replace(row, gradient_norm=_norm(gradient)))
    return done[::-1], errors


def _terms(sofar: _FromTheEnd, whole: Tensor) -> dict[str, float | None]:
    product, coefficient, through = map(_mean_std, (sofar.product, sofar.coefficient, sofar.with_after))
    direct = _norm(sofar.direct)
    return {
        "product_mean": product[0],
        "product_std": product[1],
        "coefficient_mean": coefficient[0],
        "coefficient_std": coefficient[1],
        "direct_mean": through[0],
        "direct_std": through[1],
        "direct_norm": direct,
        "rest_norm": _norm(sofar.rest),
        "direct_ratio": _ratio(direct, sofar.norm),
        "split_error": _ratio(_norm(whole - sofar.direct - sofar.rest), _norm(whole)),
    }
