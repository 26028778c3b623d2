"""What is measured of a net: a training step, or an inference."""

from __future__ import annotations

from .benchmark_net import BenchmarkNet
from .contenders import contender_by_key
from .inference_pass import InferencePass
from .training_step import TrainingStep

__all__ = ["MODES", "Run", "start"]

Run = TrainingStep | InferencePass
MODES: dict[str, type[Run]] = {"train": TrainingStep, "inference": InferencePass}


def start(mode: str, contender: str, net: BenchmarkNet, dtype: str) -> Run:
    """A contender (key) on the whole batch of its net, from seed 0."""
    return MODES[mode](contender_by_key(contender), net, *net.batch(), autocast=dtype == "bf16")
