"""Where the files of a data set lie: a directory, or a tar archive as it was downloaded."""

from __future__ import annotations

import os
import tarfile
import zlib
from dataclasses import dataclass, field
from fnmatch import fnmatch

from ..errors import UserError

__all__ = ["Folder", "folders_under", "is_archive"]

_LARGEST_FILE = 2 << 30  # bytes; the largest CIFAR file has 155 MB
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError)


@dataclass(frozen=True)
class Folder:
    """Named files, read whole.

    Attributes:
        path: the directory, or the archive.
        files: name of each file -> its path, or its member of the archive.
    """

    path: str
    files: dict[str, str | tarfile.TarInfo] = field(repr=False)

    def match(self, pattern: str) -> list[str]:
        """Names that match a shell pattern, sorted."""
        return sorted(name for name in self.files if fnmatch(name, pattern))

    def read(self, name: str) -> bytes:
        """Content of the file ``name``."""
        entry = self.files[name]
        if isinstance(entry, tarfile.TarInfo):
            try:
                with tarfile.open(self.path) as archive:
                    return archive.extractfile(entry).read()
            except _DAMAGED as error:
                raise _damaged_archive(self.path, error) from error
        try:
            if os.path.getsize(entry) > _LARGEST_FILE:
                raise UserError(f"{entry} has {os.path.getsize(entry)} bytes: that is no file of CIFAR")
            with open(entry, "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"cannot read {entry}: {error.strerror or error}") from error

    def describe(self, name: str) -> str:
        """Full name of a file, for messages."""
        return os.path.join(self.path, name)


def is_archive(path: str) -> bool:
    return path.endswith((".tar.gz", ".tgz", ".tar")) and os.path.isfile(path)


def folders_under(path: str) -> list[Folder]:
    """``path`` itself and the directories in it, or what is in an archive. Only names are read."""
    if is_archive(path):
        return _folders_of_archive(path)
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    here = Folder(path, {entry.name: entry.path for entry in entries if entry.is_file()})
    inside = []
    for entry in entries:
        if entry.is_dir():
            try:
                with os.scandir(entry.path) as files:
                    inside.append(
                        Folder(entry.path, {file.name: file.path for file in files if file.is_file()})
                    )
            except OSError:
                pass  # a directory that cannot be read is not the data
    return [here, *inside]


def _folders_of_archive(path: str) -> list[Folder]:
    folders: dict[str, Folder] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isreg() and member.size <= _LARGEST_FILE:
                    directory, name = os.path.split(member.name)
                    folders.setdefault(directory, Folder(path, {})).files[name] = member
    except _DAMAGED as error:
        raise _damaged_archive(path, error) from error
    return list(folders.values())


def _damaged_archive(path: str, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or not complete ({error}): download it again")
