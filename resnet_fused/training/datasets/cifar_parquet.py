"""CIFAR in the Hugging Face layout: parquet files of encoded images (PNG or JPEG) and labels."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import UserError
from ..lazy import require
from .folder import Folder

__all__ = ["FILES", "is_lossy", "load"]

FILES = ("train*.parquet", "test*.parquet")
_LABELS = {"label": "cifar10", "fine_label": "cifar100"}
_CHUNK = 500  # images that one task decodes
_Split = tuple[np.ndarray, np.ndarray]


def load(folder: Folder, allow_unverified: bool) -> tuple[str, _Split, _Split]:
    """All ``train*`` and ``test*`` files, in the order of their names; the label column tells which CIFAR."""
    del allow_unverified  # no checksums are published, and nothing in these files is executed
    names, splits = zip(*(_split(folder, folder.match(pattern)) for pattern in FILES))
    if names[0] != names[1]:
        raise UserError(f"{folder.path}: the train files hold {names[0]}, the test files {names[1]}")
    return names[0], splits[0], splits[1]


def is_lossy(folder: Folder) -> bool:
    """Whether the first training image is a JPEG, which the published pixels were not; PNG keeps them."""
    parquet = require("pyarrow.parquet", "pyarrow", "reading parquet files")
    file = parquet.ParquetFile(io.BytesIO(folder.read(folder.match(FILES[0])[0])))
    name = next(name for name in ("img", "image") if name in file.schema_arrow.names)
    first = next(file.iter_batches(batch_size=1, columns=[name]))
    return first.column(0)[0]["bytes"].as_py().startswith(b"\xff\xd8")


def _split(folder: Folder, files: list[str]) -> tuple[str, _Split]:
    shards = [_shard(folder, name) for name in files]
    if len({name for name, _, _ in shards}) > 1:
        raise UserError(f"{folder.path}: {', '.join(files)} hold different data sets")
    return shards[0][0], (
        np.concatenate([images for _, images, _ in shards]),
        np.concatenate([labels for _, _, labels in shards]),
    )


def _shard(folder: Folder, file: str) -> tuple[str, np.ndarray, np.ndarray]:
    parquet = require("pyarrow.parquet", "pyarrow", "reading parquet files")
    require("PIL.Image", "pillow", "reading parquet files")
    where = folder.describe(file)
    try:
        table = parquet.read_table(io.BytesIO(folder.read(file)))
        columns = set(table.column_names)
        label = next((name for name in ("fine_label", "label") if name in columns), None)
        image = next((name for name in ("img", "image") if name in columns), None)
        if label is None or image is None:
            raise UserError(
                f"{where} has the columns {sorted(columns)}: expected img and label (CIFAR-10) or img and "
                f"fine_label (CIFAR-100)"
            )
        labels = table.column(label).to_numpy().astype(np.int64)
        encoded = [row.as_py() for chunk in table.column(image).chunks for row in chunk.field("bytes")]
    except UserError:
        raise
    except Exception as error:  # pyarrow's errors on a damaged file are of many types
        raise UserError(
            f"{where} is damaged or is not a parquet file of images ({_first_line(error)}): download it again"
        ) from error

    images = np.empty((len(encoded), 32, 32, 3), np.uint8)

    def decode(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(encoded))):
            try:
                images[index] = _decode(encoded[index])
            except Exception as error:  # a damaged image can raise anything in the decoders
                raise UserError(f"{where}: image {index} cannot be read ({_first_line(error)})") from error

    with ThreadPoolExecutor(
        min(8, os.cpu_count() or 1)
    ) as pool:  # the decoders release the interpreter's lock
        for _ in pool.map(decode, range(0, len(encoded), _CHUNK)):
            pass
    return _LABELS[label], images, labels


def _decode(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if image.size != (32, 32):
            raise ValueError(f"expected 32x32 pixels, got {image.size[0]}x{image.size[1]}")
        return np.asarray(image.convert("RGB"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
