"""Checkpoint files: written whole or not at all, rejected when a bit differs, loaded without running code.

A checkpoint is what ``torch.save`` writes, a zip archive, with the SHA-256 of all its other bytes in the
comment of the archive. So ``torch.load(path, weights_only=True)`` reads it too; only :func:`load_checkpoint`
compares the checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
from typing import Any

import torch

from .errors import UserError

__all__ = ["load_checkpoint", "save_checkpoint", "second_name", "write_atomically"]

_FORMAT = 1
_COMMENT = b"resnet_fused sha256 "
_DIGEST = 64  # hexadecimal digits
_TRAILER = len(_COMMENT) + _DIGEST


def save_checkpoint(path: str, content: dict[str, Any], *, keep_previous_as: str | None = None) -> None:
    """Write ``content`` to ``path``.

    The bytes go to another file in the same directory, reach the disk, and take the name ``path`` in one
    step: whoever is killed in between leaves the old file. ``keep_previous_as`` is a second name that the old
    file then keeps.

    Args:
        path: file to write.
        content: tensors, numbers, strings, None, and lists and dictionaries of these: what ``weights_only``
            can load.
        keep_previous_as: another path in the same directory, or None.

    Raises:
        UserError: the file cannot be written (for example, no space is left). The old file is as it was.
    """
    write_atomically(path, _encode(content), keep_previous_as=keep_previous_as)


def load_checkpoint(path: str, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        UserError: no such file, truncated, changed, not a checkpoint of this package, or one that wants to
            run code.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if not data.startswith(b"PK\3\4"):
        raise UserError(f"{path} is not a checkpoint of resnet-fused (or its beginning is damaged)")
    if data[-_TRAILER:-_DIGEST] != _COMMENT:
        raise UserError(
            f"{path} has no checksum at its end: it is truncated, or was not written by resnet-fused"
        )
    if hashlib.sha256(data[:-_DIGEST]).hexdigest().encode() != data[-_DIGEST:]:
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one written with it; use an older checkpoint"
        )
    try:
        content = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, and was not loaded: do not trust this file "
            f"({_reason(error)})"
        ) from error
    except Exception as error:  # the checksum is right, so this is another version's file at best
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: {_reason(error)})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has the format {found!r}, this version of resnet-fused reads {_FORMAT}")
    return content


def write_atomically(path: str, data: bytes, *, keep_previous_as: str | None = None) -> None:
    """Replace the file ``path`` by ``data`` in one step; see :func:`save_checkpoint`."""
    temporary = (
        f"{path}.tmp"  # one process writes a run, so a fixed name: what a killed one left is written over
    )
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous_as is not None and os.path.exists(path):
            second_name(path, keep_previous_as)
        os.replace(temporary, path)
        _sync_directory(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        kept = "The file from before is kept. " if os.path.exists(path) else ""
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. {kept}Make room or choose another --output"
        ) from error


def _encode(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    archive = buffer.getvalue()
    # The end record of a zip archive ends with the length of the comment (2 bytes) and the comment.
    if archive[-22:-18] != b"PK\5\6" or archive[-2:] != b"\0\0":
        raise RuntimeError("torch.save wrote no zip archive without a comment")
    signed = archive[:-2] + _TRAILER.to_bytes(2, "little") + _COMMENT
    return signed + hashlib.sha256(signed).hexdigest().encode()


def second_name(path: str, name: str) -> None:
    """Give the file ``path`` the name ``name`` too, in one step, in place of what had it."""
    temporary = f"{name}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
    with contextlib.suppress(FileNotFoundError):  # renaming does nothing where both are links to one file
        os.unlink(temporary)


def _sync_directory(directory: str) -> None:
    """Let the new name reach the disk too, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: Exception) -> str:
    """The line of PyTorch's message that names what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else ""
    )
