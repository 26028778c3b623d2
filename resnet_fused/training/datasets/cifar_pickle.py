"""CIFAR's Python version: pickled dictionaries. A pickle can run any code, so its MD5 is compared first.

The MD5 values are those of the files that the authors publish, the same that torchvision compares.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import numpy as np

from ..errors import UserError
from .cifar_binary import planes_to_images
from .folder import Folder

__all__ = ["CIFAR100_FILES", "CIFAR10_FILES", "load_cifar10", "load_cifar100"]

_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR100_FILES = ("train", "test")
_Split = tuple[np.ndarray, np.ndarray]


def load_cifar10(folder: Folder, allow_unverified: bool) -> tuple[str, _Split, _Split]:
    batches = [_batch(folder, name, b"labels", allow_unverified) for name in CIFAR10_FILES]
    images, labels = (np.concatenate(parts) for parts in zip(*batches[:-1]))
    return "cifar10", (images, labels), batches[-1]


def load_cifar100(folder: Folder, allow_unverified: bool) -> tuple[str, _Split, _Split]:
    train, test = (_batch(folder, name, b"fine_labels", allow_unverified) for name in CIFAR100_FILES)
    return "cifar100", train, test


def _batch(folder: Folder, name: str, label_key: bytes, allow_unverified: bool) -> _Split:
    content, where = folder.read(name), folder.describe(name)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != _MD5[name] and not allow_unverified:
        raise UserError(
            f"{where} is not the published file (MD5 {found}, expected {_MD5[name]}) and was not unpickled: "
            f"download it again, or pass --allow-unverified if you trust it"
        )
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(batch[b"data"])
        labels = np.asarray(batch[label_key])
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{where} is damaged or is not a batch of CIFAR ({type(error).__name__}: {error}): download it "
            f"again"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise UserError(
            f"{where}: expected data of type uint8 and shape [N, 3072], got {images.dtype} and "
            f"{list(images.shape)}"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: expected {len(images)} integer labels, got {labels.dtype} and {list(labels.shape)}"
        )
    return planes_to_images(images), labels.astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that can make NumPy arrays and the plain containers, and calls nothing else."""

    _ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise UserError(
                f"the pickle asks for {module}.{name}, which no batch of CIFAR does: it was not run. Do not "
                f"use this file"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
