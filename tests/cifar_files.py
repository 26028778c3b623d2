"""CIFAR in small, written in each of the published forms."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

COUNT = 4  # images per file


def image_rows(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (COUNT, 3072)).astype(np.uint8)


def expected_images(rows: np.ndarray) -> torch.Tensor:
    """(N, 32, 32, 3) from colour planes, pixel by pixel."""
    images = np.zeros((len(rows), 32, 32, 3), np.uint8)
    for channel in range(3):
        images[..., channel] = rows[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
    return torch.from_numpy(images)


CIFAR10_BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
ROWS = {name: image_rows(seed) for seed, name in enumerate([*CIFAR10_BATCHES, "train", "test"])}
LABELS = {name: [(seed + i) % 10 for i in range(COUNT)] for seed, name in enumerate(ROWS)}


def write_pickles10(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in CIFAR10_BATCHES:
        batch = {
            b"batch_label": b"made by a test",
            b"labels": LABELS[name],
            b"data": ROWS[name],
            b"filenames": [],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def write_pickles100(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        batch = {
            b"fine_labels": [90 + i for i in LABELS[name]],
            b"coarse_labels": LABELS[name],
            b"data": ROWS[name],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def write_binary10(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in CIFAR10_BATCHES:
        records = np.concatenate([np.array(LABELS[name], np.uint8)[:, None], ROWS[name]], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def write_binary100(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        labels = np.array(LABELS[name], np.uint8)[:, None]
        (folder / f"{name}.bin").write_bytes(
            np.concatenate([labels, labels + 90, ROWS[name]], axis=1).tobytes()
        )
    return folder


def write_parquet(
    folder: Path, label: str = "label", offset: int = 0, image: str = "img", encoding: str = "PNG"
) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pil = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)

    def encode(pixels: np.ndarray) -> bytes:
        content = io.BytesIO()
        pil.fromarray(pixels).save(content, encoding)
        return content.getvalue()

    shards = {
        "train-00000-of-00002": "train",
        "train-00001-of-00002": "data_batch_1",
        "test-00000-of-00001": "test",
    }
    for file, name in shards.items():
        images = [{"bytes": encode(pixels), "path": None} for pixels in expected_images(ROWS[name]).numpy()]
        columns = {image: images, label: [offset + i for i in LABELS[name]]}
        parquet.write_table(pyarrow.table(columns), folder / f"{file}.parquet")
    return folder


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


FORMS = {
    "pickles10": ("cifar10", "cifar-10-batches-py", write_pickles10),
    "pickles100": ("cifar100", "cifar-100-python", write_pickles100),
    "binary10": ("cifar10", "cifar-10-batches-bin", write_binary10),
    "binary100": ("cifar100", "cifar-100-binary", write_binary100),
}
