"""Does the fused net compute what the plain net computes? Asked before anything is timed.

The project's trust rule: against a float64 run of the plain net, error(fused) <= 2 x error(plain net, same
dtype) + 2 ulp. A deep net amplifies every rounding, so single elements say nothing; the rule is applied to
the Euclidean norm of each quantity: the losses of the images, the gradient of each parameter, the running
statistics of each norm; in inference, to the logits.

The losses and the running statistics depend continuously on every rounding. The gradients do not: the
derivative of ReLU jumps at 0, and where a pre-activation is nearer to 0 than it is exact, its sign is a
matter of luck. In float32 that happens to a handful of the millions of pre-activations of a step, in one run
and not in another: a single one moves the gradient of its channel by some 1e-3 while everything else agrees
to 1e-6. So the effect of the signs in doubt is measured on the plain net (:func:`signs_in_doubt`) and counts
as error of the plain run. In bfloat16 thousands of signs differ in every run, and the plain run's own error
shows what they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fusion.doubt import every_relu
from .benchmark_net import BenchmarkNet
from .contenders import CONTENDERS, DTYPES, Contender
from .inference_pass import InferencePass, calibrated_state
from .training_step import TrainingStep

__all__ = ["Accuracy", "compare", "verify"]

# A pre-activation is in doubt if it is nearer to 0 than this many times the root mean square error of its
# layer.
_DOUBT = 4.0


@dataclass(frozen=True)
class Accuracy:
    """The outcome of :func:`compare`: the quantity that comes nearest to what is allowed, or goes furthest
    beyond."""

    quantity: str
    error: float    # of the fused net, relative to the norm of the quantity
    plain: float    # of the plain net in the same dtype, likewise
    used: float     # error of the fused net / what is allowed: at most 1 if all is well; NaN is not well
    failed: int     # quantities beyond
    compared: int

    @property
    def ok(self) -> bool:
        return self.failed == 0

    def __str__(self) -> str:
        worst = f"{self.quantity}, {self.used:.2f} of the allowed error"
        if self.ok:
            return f"verified, worst of {self.compared}: {worst}"
        return (f"WRONG, {self.failed} of {self.compared} quantities, worst: {worst} "
                f"({self.error:.1e}, the plain net has {self.plain:.1e})")


def compare(exact: Mapping[str, Tensor], fused: Mapping[str, Tensor], plains: Iterable[Mapping[str, Tensor]],
            dtype: torch.dtype, doubt: Mapping[str, float] | None = None) -> Accuracy:
    """Apply the trust rule to each quantity.

    Args: exact: of the plain net in float64. fused: of the fused net. plains: of the plain net in the dtype
        of the fused one. Of several, say one per memory format, the greatest
            error counts: a single run's error is itself a matter of luck.
        dtype: gives the ulp: 2 * eps * norm is allowed on top.
        doubt: of :func:`signs_in_doubt`, added to the plain net's error; absent: 0.
    """
    plains = list(plains)
    if any(set(other) != set(exact) for other in (fused, *plains)):
        raise ValueError("the nets do not have the same parameters and buffers")
    worst, failed = None, 0
    for name, value in exact.items():
        norm = float(value.norm())
        error = float((fused[name] - value).norm())
        plain = max(float((other[name] - value).norm()) for other in plains) + (doubt or {}).get(name, 0.0)
        allowed = 2 * plain + 2 * torch.finfo(dtype).eps * norm
        used = error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
        failed += not used <= 1  # also if NaN
        if worst is None or not used <= worst.used:
            scale = norm if norm > 0 else 1.0
            worst = Accuracy(name, error / scale, plain / scale, used, 0, 0)
    return Accuracy(worst.quantity, worst.error, worst.plain, worst.used, failed, len(exact))


def verify(net: BenchmarkNet, mode: str, dtypes: Iterable[str]) -> dict[str, Accuracy]:
    """Compare the fused net with the plain one, from the same weights and on the same batch, of
    ``net.verify_batch_size`` images, in each of ``dtypes``.

    Where that is a part of ``net.batch_size``, the fused net also takes as many copies of it as there are
    images (kernels depend on sizes): losses, logits and gradients are those of one copy, and so are a batch's
    statistics.

    Args: mode: "train": losses, gradients and running statistics; "inference": the logits in eval mode.
    """
    images, labels = net.batch(net.verify_batch_size)
    return (_verify_inference if mode == "inference" else _verify_step)(net, images, labels, dtypes)


def _of_copies(quantities: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """What so many copies of the batch give. An unbiased variance depends on the number of values: left out."""
    return {
        name: value.repeat(copies, *(1,) * (value.dim() - 1)) if name in ("losses", "logits") else value
        for name, value in quantities.items() if not name.endswith("running_var")
    }


def _compare_with_copies(exact: Mapping[str, Tensor], fused: Callable[[int], Mapping[str, Tensor]],
                         plains: list[Mapping[str, Tensor]], dtype: torch.dtype, copies: int,
                         doubt: Mapping[str, float] | None = None) -> Accuracy:
    """:func:`compare` for the batch, and for so many copies of it; fused: what the fused net gives for a number
    of them."""
    one = compare(exact, fused(1), plains, dtype, doubt)
    if copies == 1:
        return one
    whole = compare(_of_copies(exact, copies), _of_copies(fused(copies), 1),
                    [_of_copies(plain, copies) for plain in plains], dtype, doubt)
    worst = max(one, whole, key=lambda accuracy: (accuracy.failed, accuracy.used))
    return replace(worst, failed=one.failed + whole.failed, compared=one.compared + whole.compared)


def _verify_step(net: BenchmarkNet, images: Tensor, labels: Tensor,
                 dtypes: Iterable[str]) -> dict[str, Accuracy]:
    nchw, channels_last, fused = CONTENDERS[0], CONTENDERS[1], CONTENDERS[-1]
    pre_activations: list[Tensor] = []  # as float32: exact where it matters, near 0
    reference = TrainingStep(nchw, net, images.double(), labels, autocast=False)
    reference.model.double()
    with every_relu(lambda index, z, slope: pre_activations.append(z.detach().float())):
        losses = reference.losses()
    exact = _quantities(reference, losses)
    del reference, losses

    results = {}
    for dtype in dtypes:
        def step(contender: Contender, copies: int = 1) -> TrainingStep:
            return TrainingStep(contender, net, images.repeat(copies, 1, 1, 1), labels.repeat(copies),
                                autocast=dtype == "bf16")

        doubt = None if dtype == "bf16" else signs_in_doubt(step(channels_last), pre_activations)
        plains = [_run(step(nchw)), _run(step(channels_last))]
        results[dtype] = _compare_with_copies(exact, lambda copies: _run(step(fused, copies)), plains,
                                              DTYPES[dtype], net.batch_size // len(images), doubt)
    return results


def _verify_inference(net: BenchmarkNet, images: Tensor, labels: Tensor,
                      dtypes: Iterable[str]) -> dict[str, Accuracy]:
    state = calibrated_state(net)

    def logits(contender: Contender, dtype: str, copies: int = 1) -> dict[str, Tensor]:
        one = InferencePass(contender, net, images.repeat(copies, 1, 1, 1), labels.repeat(copies),
                            autocast=dtype == "bf16", state=state)
        if dtype == "fp64":
            one.model.double()
            one.images = one.images.double()
        return {"logits": one().double()}

    nchw, channels_last, fused = CONTENDERS[0], CONTENDERS[1], CONTENDERS[-1]
    exact = logits(nchw, "fp64")
    return {
        dtype: _compare_with_copies(exact, lambda copies: logits(fused, dtype, copies),
                                    [logits(nchw, dtype), logits(channels_last, dtype)], DTYPES[dtype],
                                    net.batch_size // len(images))
        for dtype in dtypes
    }


def signs_in_doubt(step: TrainingStep, exact: list[Tensor]) -> dict[str, float]:
    """By how much the gradients of a plain net change (Euclidean norm of each) if the derivative of every
    (Leaky)ReLU is reversed wherever the sign of its input is not certain.

    Args:
        step: the plain net, float32.
        exact: the inputs of its ReLUs as a float64 run has computed them, in order.
    """
    reverse = False

    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z: Tensor, slope: float, certain: float) -> Tensor:
            ctx.save_for_backward(z > 0, z.abs() < certain)
            ctx.slope = slope
            return F.leaky_relu(z, slope) if slope else torch.relu(z)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
            positive, doubtful = ctx.saved_tensors
            positive = positive ^ doubtful if reverse else positive
            return torch.where(positive, gradient, gradient * ctx.slope), None, None

    def relu(index: int, z: Tensor, slope: float) -> Tensor:
        error = (z.detach() - exact[index]).square().mean().sqrt()
        return Relu.apply(z, slope, _DOUBT * float(error))

    with every_relu(relu):
        losses = step.losses()
    ordinary = _quantities(step, losses, retain_graph=True)
    reverse = True
    reversed_ = _quantities(step, losses)
    return {name: float((reversed_[name] - value).norm()) for name, value in ordinary.items()}


def _run(step: TrainingStep) -> dict[str, Tensor]:
    return _quantities(step, step.losses())


def _quantities(step: TrainingStep, losses: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
    """What a step computes, in float64: losses, gradients and running statistics."""
    step.optimizer.zero_grad(set_to_none=True)
    losses.mean().backward(retain_graph=retain_graph)
    quantities = {"losses": losses.detach()}
    for name, parameter in step.model.named_parameters():
        quantities[f"gradient of {name}"] = parameter.grad
    for name, buffer in step.model.named_buffers():
        if buffer.is_floating_point():
            quantities[name] = buffer
    return {name: value.double() for name, value in quantities.items()}
