"""ImageNet and its like: a directory per class, read by torchvision's ImageFolder and a DataLoader."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batches import Normalization, epoch_generator
from .errors import UserError
from .lazy import require

__all__ = ["ImageFolderSource", "is_image_folder"]

_SPLITS = ("train", "val")
#: Mean and standard deviation of ImageNet's training images, as torchvision's presets have them.
_IMAGENET = Normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_RESIZE = 256 / 224  # the shorter side before the centre crop, as a multiple of the crop
_PREFETCH = 4  # batches that a worker prepares ahead


def is_image_folder(path: str) -> bool:
    """Whether ``path`` has the two directories ``train`` and ``val``."""
    return all(os.path.isdir(os.path.join(path, split)) for split in _SPLITS)


class ImageFolderSource:
    """``path/train/CLASS/*`` and ``path/val/CLASS/*``, as a ``sources.BatchSource``.

    Workers decode and crop (torchvision's RandomResizedCrop and RandomHorizontalFlip; for the test Resize and
    CenterCrop) and send 8-bit images, over pinned memory to a CUDA device, which normalises them. Each
    training image's random numbers come from a seed of its own, so that they depend on (seed, epoch, image)
    and not on the number of workers.

    Args:
        path: the directory with both splits.
        image_size: pixels of the crop's side.
        workers: processes that read; 0: none, the loop itself reads.

    Raises:
        UserError: torchvision is missing, a split has no images, or the splits have other classes.
    """

    name = "images"
    channels = 3

    def __init__(
        self,
        path: str,
        device: torch.device,
        *,
        image_size: int = 224,
        workers: int = 4,
        normalization: Normalization | None = None,
    ) -> None:
        folder = require("torchvision.datasets", "torchvision", "a directory of images").ImageFolder
        transforms = require("torchvision.transforms.v2", "torchvision", "a directory of images")
        self._device, self._workers = device, workers
        self.normalization = normalization or _IMAGENET
        self.in_flight = workers * _PREFETCH
        splits = {}
        for split in _SPLITS:
            try:
                splits[split] = folder(os.path.join(path, split))
            except (FileNotFoundError, OSError) as error:  # no classes, or one without images
                raise UserError(f"no images in {os.path.join(path, split)}: {error}") from error
        train, val = splits["train"], splits["val"]
        if train.classes != val.classes:
            odd = sorted(set(train.classes) ^ set(val.classes))
            told = ", ".join([*odd[:5], *(["..."] if len(odd) > 5 else [])])
            raise UserError(f"{path}: train and val have different classes ({told})")
        self._splits = splits
        self.classes, self.train_count, self.test_count = len(train.classes), len(train), len(val)
        self._train = _Images(
            train.samples,
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(image_size, antialias=True),
                    transforms.RandomHorizontalFlip(),
                    transforms.PILToTensor(),
                ]
            ),
        )
        self._test = _Images(
            val.samples,
            transforms.Compose(
                [
                    transforms.Resize(round(image_size * _RESIZE), antialias=True),
                    transforms.CenterCrop(image_size),
                    transforms.PILToTensor(),
                ]
            ),
        )
        self._order = _Order()
        self._train_loader = self._loader(self._train, self._order, persistent=True)

    def fingerprint(self) -> str:
        """Of the classes and the names of all files: their contents would take as long as an epoch."""
        digest = hashlib.sha256()
        for split in _SPLITS:
            data = self._splits[split]
            digest.update(repr((split, data.classes)).encode())
            for file, label in data.samples:
                digest.update(f"{os.path.relpath(file, data.root)} {label}\n".encode())
        return digest.hexdigest()

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_batch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(self.train_count, generator=generator)
        seeds = torch.randint(2**62, (self.train_count,), generator=generator)
        self._order.set(order[first_batch * batch_size :], seeds[first_batch * batch_size :], batch_size)
        return self._batches(self._train_loader)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = _Order()
        order.set(torch.arange(self.test_count), torch.zeros(self.test_count, dtype=torch.int64), batch_size)
        return self._batches(self._loader(self._test, order, persistent=False))

    def _loader(self, images: _Images, order: _Order, *, persistent: bool) -> DataLoader:
        settings: dict[str, Any] = {}
        if self._workers:
            settings = {"persistent_workers": persistent, "prefetch_factor": _PREFETCH}
        return DataLoader(
            images,
            batch_sampler=order,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Else it draws its workers' seed from the generator that the net's dropout draws from.
            generator=torch.Generator(),
            **settings,
        )

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for images, labels in loader:
                images = images.to(self._device, non_blocking=True).permute(0, 2, 3, 1)
                normalised = self.normalization.apply(images.contiguous()).permute(0, 3, 1, 2)
                yield normalised, labels.to(self._device, non_blocking=True)
        except UserError as error:  # from a worker with the worker's traceback before it
            raise UserError(str(error).rpartition("UserError: ")[2]) from None


class _Order:
    """Batches of (index, seed of the augmentation), in the order that was set last."""

    def set(self, order: Tensor, seeds: Tensor, batch_size: int) -> None:
        self._order, self._seeds, self._batch_size = order, seeds, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices, seeds in zip(self._order.split(self._batch_size), self._seeds.split(self._batch_size)):
            yield list(zip(indices.tolist(), seeds.tolist()))

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)


class _Images(Dataset):
    """Decoded and transformed images: uint8, (3, H, W)."""

    def __init__(self, samples: list[tuple[str, int]], transform: Any) -> None:
        self._samples, self._transform = samples, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image

        index, seed = key
        path, label = self._samples[index]
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except Exception as error:  # a damaged image can raise anything in the decoders
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            torch.default_generator.manual_seed(seed)
            return self._transform(image), label

    def __len__(self) -> int:
        return len(self._samples)
