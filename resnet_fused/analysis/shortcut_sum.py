"""x_l carried along the shortcuts with the residuals added to it, to twice the precision of the net."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ShortcutSum", "ulp_of_largest"]


class ShortcutSum:
    """S = x_l; then S = k * S + F for each unit, to twice the precision of the tensors.

    Equation 4 of He et al. 2016, "Identity Mappings in Deep Residual Networks" (k = 1: x_L = x_l + sum F),
    and equation 7 (x_L = prod k * x_l + sum F, each F multiplied by the k of the units above it), where the
    addition is the last thing that a unit does. S is held as an unevaluated sum of two numbers: Knuth's
    two-sum, and the two-product of Dekker, "A floating-point technique for extending the available precision"
    (1971).

    Beside S it sums what rounding can have done to the net's own x_L: half an ulp of k * x where k is not 1,
    half an ulp of the addition, both multiplied by the k of the units above.

    Args:
        x: x_l, float32 or float64, of any shape; all other tensors are of this dtype and shape.
    """

    def __init__(self, x: Tensor) -> None:
        if x.dtype not in _SPLITTER:
            raise TypeError(f"ShortcutSum: expected float32 or float64, but got {x.dtype}")
        self._high, self._low = x.detach().clone(), torch.zeros_like(x)
        self._bound = torch.zeros_like(x, dtype=torch.float64)

    def add(self, factor: float | Tensor, residual: Tensor, shortcut: Tensor, addition: Tensor) -> None:
        """One unit.

        Args:
            factor: k, a number, or a tensor where each element has its own.
            residual: F, as added.
            shortcut: k * x, as the net rounded it.
            addition: their sum, as the net rounded it.
        """
        if isinstance(factor, Tensor) or factor != 1.0:
            k = factor.detach() if isinstance(factor, Tensor) else torch.full_like(residual, factor)
            high, error = _two_product(self._high, k)
            self._high, self._low = _two_sum(high, self._low * k + error)
            self._bound = self._bound * k.abs() + _half_ulp(shortcut.detach())
        high, error = _two_sum(self._high, residual.detach())
        self._high, self._low = _two_sum(high, self._low + error)
        self._bound = self._bound + _half_ulp(addition.detach())

    def deviation(self, x: Tensor) -> Tensor:
        """x - S, for example x = x_L."""
        return (x.detach() - self._high) - self._low

    def bound(self) -> Tensor:
        """The largest deviation that rounding can cause, element by element, float64."""
        return self._bound


#: The factor that splits a significand (of 24 or 53 binary digits) into halves whose products are exact.
_SPLITTER = {torch.float32: 2.0**12 + 1, torch.float64: 2.0**27 + 1}


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as rounded, and the rounding error, exactly."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a * b as rounded, and the rounding error, exactly (without overflow and underflow)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    scaled = a * _SPLITTER[a.dtype]
    high = scaled - (scaled - a)
    return high, a - high


def _half_ulp(value: Tensor) -> Tensor:
    """Half the gap to the next larger magnitude, float64: how far off a rounded result can be; 0 for 0."""
    size = value.abs()
    gap = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return torch.where(value == 0, 0.0, 0.5 * gap.double())


def ulp_of_largest(value: Tensor) -> float:
    """The unit in the last place of the largest magnitude in ``value``, in its dtype; 0 if all are 0."""
    return 2 * float(_half_ulp(value.detach().abs().max()))
