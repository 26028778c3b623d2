"""CIFAR-10 and CIFAR-100: finds which of the published forms lies at a path.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from . import cifar_binary, cifar_parquet, cifar_pickle
from .folder import Folder, folders_under, is_archive
from .images import ImageDataset

__all__ = ["load_cifar"]

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Form:
    """A published form: ``files`` are shell patterns of its files, each of which has to be there."""

    title: str
    files: tuple[str, ...]
    load: Callable[[Folder, bool], tuple[str, Split, Split]]
    is_lossy: Callable[[Folder], bool] = lambda folder: False


_FORMS = (
    _Form("CIFAR-10 (Python pickles)", cifar_pickle.CIFAR10_FILES, cifar_pickle.load_cifar10),
    _Form("CIFAR-100 (Python pickles)", cifar_pickle.CIFAR100_FILES, cifar_pickle.load_cifar100),
    _Form("CIFAR-10 (binary version)", cifar_binary.CIFAR10_FILES, cifar_binary.load_cifar10),
    _Form("CIFAR-100 (binary version)", cifar_binary.CIFAR100_FILES, cifar_binary.load_cifar100),
    _Form("CIFAR (Hugging Face parquet)", cifar_parquet.FILES, cifar_parquet.load, cifar_parquet.is_lossy),
)
_EXPECTED = (
    "expected cifar-10-batches-py, cifar-100-python, cifar-10-batches-bin, cifar-100-binary, their .tar.gz, "
    "train*.parquet and test*.parquet, or train/ and val/ with a directory of images per class"
)


def load_cifar(path: str, *, allow_unverified: bool = False) -> ImageDataset:
    """CIFAR-10 or CIFAR-100 from a directory, its parent, or an archive; see ``load_dataset``."""
    if not os.path.exists(path):
        raise UserError(
            f"no data at {path!r}: there is no such file or directory. Give --data digits, or the directory "
            f"that holds CIFAR-10 or CIFAR-100"
        )
    if os.path.isfile(path) and not is_archive(path):
        raise UserError(
            f"{path} is a file: give the directory that holds the data, or a .tar.gz as downloaded"
        )
    folder, form = _find(path)
    missing = [pattern for pattern in form.files if not folder.match(pattern)]
    if missing:
        raise UserError(f"{folder.path} holds {form.title} but {', '.join(missing)} is missing: restore it")
    name, train, test = form.load(folder, allow_unverified)
    classes = {"cifar10": 10, "cifar100": 100}[name]
    for split, (images, labels) in (("train", train), ("test", test)):
        if len(images) == 0:
            raise UserError(f"{folder.path}: the {split} split has no images")
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(
                f"{folder.path}: the {split} split has labels from {labels.min()} to {labels.max()}, "
                f"expected 0 to {classes - 1}"
            )
    return ImageDataset.from_numpy(
        name, train, test, classes, horizontal_flip=True, lossy=form.is_lossy(folder)
    )


def _find(path: str) -> tuple[Folder, _Form]:
    folders = folders_under(path)
    found = [(folder, form) for folder in folders for form in _FORMS if _holds(folder, form)]
    if not found and not is_archive(path):  # nothing unpacked: archives as they were downloaded
        archives = [os.path.join(path, name) for name in folders[0].match("cifar-10*.tar*")]
        found = [
            (folder, form)
            for archive in archives
            for folder in folders_under(archive)
            for form in _FORMS
            if _holds(folder, form)
        ]
    if not found:
        raise UserError(f"no CIFAR-10 or CIFAR-100 in {path}: {_EXPECTED}")
    complete = [
        (folder, form) for folder, form in found if all(folder.match(pattern) for pattern in form.files)
    ]
    found = complete or found
    if len({folder.path for folder, _ in found}) > 1 or len(found) > 1:
        choices = ", ".join(f"{folder.path}: {form.title}" for folder, form in found)
        raise UserError(f"{path} holds more than one data set ({choices}): give the one to use")
    return found[0]


def _holds(folder: Folder, form: _Form) -> bool:
    """Whether ``folder`` has a file that only this form has."""
    return any(folder.match(pattern) for pattern in form.files)
