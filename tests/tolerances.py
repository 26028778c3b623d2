"""The one table of tolerances, each with its reason, and the trust rule.

The trust rule: against an oracle in float64,

    error(fused) <= 2 * error(plain PyTorch, same dtype) + 2 ulp of the oracle's largest value,

error being the largest absolute difference. Plain PyTorch is the yardstick: it carries the input's
conditioning, the dtype and the length of the sums, so no tolerance is set by hand for any of them.
"""

import torch
from torch import Tensor

#: Another order of the same additions can double the error of the worst element.
TRUST_FACTOR = 2.0
#: Where plain PyTorch is exact by luck (few elements, powers of two): one rounding more or less of the
#: largest value.
TRUST_ULP = 2.0
#: Where the yardstick says nothing: it is near zero by luck in the few elements of a per-channel or
#: per-weight sum, and is the oracle itself in float64. A sum of terms t is then allowed this many eps *
#: sum|t|, a few roundings of its largest partial sum (Higham 2002, section 4.2: in any order the error is
#: below n * eps * sum|t|, typically sqrt(n) of that n).
SUM_EPS = 2.0
#: float64, where the oracle is no better than the result: a difference that only float64 arithmetic can
#: reach, with room for sums of a thousand terms.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}
#: Statistics, relative to the standard deviation for the mean and to M2 for M2: a few roundings of the merged
#: partials.
STATS_EPS = 16.0
#: gradcheck and gradgradcheck, float64: finite differences with step 1e-6 of functions of size ~1, atol =
#: their truncation and cancellation error.
GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}


def library_has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has convolutions of this dtype there. Its substitute for bfloat16 adds up in bfloat16, and is no
    yardstick for it."""
    return device.type != "cpu" or dtype is not torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from value to the next number of dtype."""
    if value == 0:
        return torch.finfo(dtype).smallest_normal
    exponent = torch.frexp(torch.tensor(abs(value), dtype=torch.float64)).exponent.item() - 1
    return torch.finfo(dtype).eps * 2.0**exponent


def largest_error(value: Tensor, oracle: Tensor) -> float:
    """The largest absolute difference where the oracle is finite."""
    if value.numel() == 0:
        return 0.0
    finite = oracle.isfinite()
    difference = (value.double() - oracle.double()).abs()
    return torch.where(finite, difference, 0.0).max().item()


def assert_trusted_on_average(
    fused: list[Tensor], plain: list[Tensor], oracle: list[Tensor], name: str = ""
) -> None:
    """The trust rule with root mean squares over several draws instead of maxima, for gradients in half
    precision through two or more ReLUs.

    The derivative of ReLU jumps at 0. An input of the second ReLU that is within rounding of 0 falls on
    either side by chance, in plain PyTorch as in the fused operator, and one such element is an error of the
    size of the gradient itself. How often that happens, and so the root mean square over many elements, is
    what can be compared.
    """

    def flat(tensors):
        return torch.cat([t.double().flatten() for t in tensors])

    expected = flat(oracle)
    error, yardstick, typical = (
        t.square().mean().sqrt().item() for t in (flat(fused) - expected, flat(plain) - expected, expected)
    )
    allowed = TRUST_FACTOR * yardstick + TRUST_ULP * ulp(typical, fused[0].dtype)
    assert error <= allowed, (
        f"{name}: RMS error {error:.3e} > allowed {allowed:.3e} (plain PyTorch {yardstick:.3e})"
    )


def assert_trusted(
    fused: Tensor, plain: Tensor, oracle: Tensor, name: str = "", sum_of_terms: Tensor | float = 0.0
) -> None:
    """The trust rule for one tensor. Where plain PyTorch is not finite, fused must be not finite in the same
    way.

    Args:
        sum_of_terms: sum of |t| over the terms of each element, for the few-element sums (SUM_EPS).
    """
    assert fused.shape == oracle.shape, f"{name}: {tuple(fused.shape)} instead of {tuple(oracle.shape)}"
    if fused.dtype == torch.float64 and not isinstance(sum_of_terms, Tensor):
        torch.testing.assert_close(fused, oracle, **FLOAT64, equal_nan=True)
        return
    assert torch.equal(fused.isnan(), plain.isnan()), f"{name}: NaN at other places than plain PyTorch"
    assert torch.equal(fused.isposinf(), plain.isposinf()), f"{name}: inf at other places than plain PyTorch"
    assert torch.equal(fused.isneginf(), plain.isneginf()), f"{name}: -inf at other places than plain PyTorch"
    if fused.numel() == 0:
        return
    # Where plain PyTorch overflows, the oracle in float64 does not: nothing to compare.
    oracle = torch.where(plain.isfinite(), oracle.double(), torch.nan)
    if not oracle.isfinite().any():
        return
    error, yardstick = largest_error(fused, oracle), largest_error(plain, oracle)
    largest = oracle[oracle.isfinite()].abs().max().item()
    acc_eps = torch.finfo(torch.float64 if fused.dtype == torch.float64 else torch.float32).eps
    terms = sum_of_terms.abs().max().item() if isinstance(sum_of_terms, Tensor) else sum_of_terms
    allowed = TRUST_FACTOR * yardstick + TRUST_ULP * ulp(largest, fused.dtype) + SUM_EPS * acc_eps * terms
    assert error <= allowed, (
        f"{name}: error {error:.3e} > allowed {allowed:.3e} (plain PyTorch {yardstick:.3e}, largest value "
        f"{largest:.3e}, {fused.dtype})"
    )
