"""Learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

__all__ = ["SCHEDULES", "make_schedule"]

SCHEDULES = ("step", "cosine", "constant")


def make_schedule(
    name: str,
    lr: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_lr: float | None = None,
    milestones: Sequence[float] = (0.5, 0.75),
    milestone_steps: Sequence[int] | None = None,
    gamma: float = 0.1,
) -> Callable[[int], float]:
    """The learning rate of step 0, 1, ..., ``total_steps`` - 1.

    Args:
        name: "step": multiplied by ``gamma`` at each of the ``milestones`` (He et al. 2016: at 32k and 48k of
            64k steps, which the defaults are); "cosine": half a cosine from ``lr`` to 0 (Loshchilov and
            Hutter 2017, equation 5 without restarts); "constant".
        lr: the highest learning rate.
        warmup_steps: the first steps rise in a straight line from ``lr / warmup_steps`` to ``lr`` (Goyal et
            al. 2017).
        warmup_lr: the first steps have this learning rate instead (He et al. 2016, appendix: 0.01).
        milestones: fractions of ``total_steps``.
        milestone_steps: steps, instead of ``milestones``: the first ones with the lower learning rate.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: expected one of {', '.join(SCHEDULES)}")
    if milestone_steps is None:
        borders = [math.ceil(fraction * total_steps) for fraction in sorted(milestones)]
    else:
        borders = sorted(milestone_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps if warmup_lr is None else warmup_lr
        if name == "step":
            return lr * gamma ** bisect.bisect_right(borders, step)
        if name == "cosine":
            progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return lr

    return schedule
