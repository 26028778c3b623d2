"""How many images a second come from the source of batches alone, without a net that takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["loader_images_per_second"]


def loader_images_per_second(
    batches: Iterator[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    in_flight: int = 0,
    seconds: float = 0.5,
) -> float:
    """Images a second of ``batches`` in the steady state.

    The first batch and those that workers have prepared while it was waited for are not counted, unless there
    are no
    others: then everything is, the start of the workers included. The clock is read when the device has made
    the batches.

    Args:
        in_flight: batches that are prepared ahead.
        seconds: stop when as many have passed.
    """
    images = skipped = images_in_all = 0
    begin = start = time.perf_counter()
    for batch, _ in batches:
        images_in_all += len(batch)
        if skipped <= in_flight:
            skipped += 1
            _wait(device)
            start = time.perf_counter()
        else:
            images += len(batch)
            if time.perf_counter() - start > seconds:
                break
    _wait(device)
    end = time.perf_counter()
    return images / (end - start) if images else images_in_all / (end - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
