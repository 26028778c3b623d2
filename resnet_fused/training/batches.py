"""Batches of augmented, normalised images; an epoch's order and augmentation follow from (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Normalization", "augmented_batches", "epoch_generator", "plain_batches"]

_PADDING = 4  # pixels on every side before the random crop; He et al. 2016, section 4


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, in units of the full scale (255)."""

    mean: list[float]
    std: list[float]

    def apply(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, C) -> float32 (N, H, W, C)."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=images.device)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std)], device=images.device)
        return torch.addcmul(shift, images.to(torch.float32), scale)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator for one epoch, seeded with a hash, so that neighbours have nothing in common."""
    digest = hashlib.sha256(f"resnet_fused {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def augmented_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    normalization: Normalization,
    generator: torch.Generator,
    *,
    horizontal_flip: bool,
    first_batch: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: shuffled, framed by 4 pixels, cropped at random, half of them mirrored.

    All random numbers are drawn before the first batch, on the CPU, so that they depend neither on the device
    nor on the batch size. The frame is 0 after the normalisation.

    Args:
        images: uint8, (N, H, W, C), on any device.
        labels: int64, (N,), on the device of ``images``.
        batch_size: images per batch; the last batch of an epoch can have fewer.
        first_batch: leave out as many batches at the beginning; the others are the same.

    Yields:
        float32 images of shape (B, C, H, W), channels_last, and int64 labels of shape (B,).
    """
    count, height, width, channels = images.shape
    device = images.device
    order = torch.randperm(count, generator=generator).to(device)
    top = torch.randint(2 * _PADDING + 1, (count,), generator=generator).to(device)
    left = torch.randint(2 * _PADDING + 1, (count,), generator=generator).to(device)
    mirrored = torch.randint(2, (count,), generator=generator).to(device, torch.bool) & horizontal_flip
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)

    for start in range(first_batch * batch_size, count, batch_size):
        part = slice(start, start + batch_size)
        chosen = order[part]
        framed = torch.zeros(
            len(chosen), height + 2 * _PADDING, width + 2 * _PADDING, channels, device=device
        )
        framed[:, _PADDING:-_PADDING, _PADDING:-_PADDING] = normalization.apply(images[chosen])
        x = torch.where(mirrored[part, None], width - 1 - columns, columns) + left[part, None]  # (B, W)
        y = rows + top[part, None]  # (B, H)
        image = torch.arange(len(chosen), device=device)[:, None, None]
        batch = framed[image, y[:, :, None], x[:, None, :]]  # (B, H, W, C)
        yield batch.permute(0, 3, 1, 2), labels[chosen]


def plain_batches(
    images: Tensor, labels: Tensor, batch_size: int, normalization: Normalization
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order, normalised and not augmented; shapes and layout as in :func:`augmented_batches`."""
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        yield normalization.apply(images[part]).permute(0, 3, 1, 2), labels[part]
