"""Labelled images in memory: scikit-learn's digits, CIFAR-10 and CIFAR-100 in every published form."""

from __future__ import annotations

import os

from .cifar import load_cifar
from .digits import load_digits
from .images import ImageDataset

__all__ = ["ImageDataset", "load_dataset"]


def load_dataset(data: str | os.PathLike[str], *, allow_unverified: bool = False) -> ImageDataset:
    """The data set that ``data`` names.

    Args:
        data: ``"digits"`` (scikit-learn's, nothing to download), or a directory or ``.tar.gz`` file with
            CIFAR-10 or CIFAR-100 as Python pickles, in the binary version, or as Hugging Face parquet files.
            The directory may be the parent of the one that holds the files.
        allow_unverified: read CIFAR files that are not the published ones (pickles whose MD5 differs, binary
            files of another length). Pickles are read by an unpickler that knows nothing but NumPy arrays,
            either way.

    Raises:
        UserError: nothing there, more than one data set there, or a file that is damaged; the message says
            what to do.
    """
    if os.fspath(data) == "digits":
        return load_digits()
    return load_cifar(os.fspath(data), allow_unverified=allow_unverified)
