"""Measured choices, kept on disk: which tile configuration a problem gets, and where the unfused path won.

Nothing here measures: ``tuner.tune`` does, when it is asked to, and stores what it finds. One JSON file per
device, Triton version and package version lies in RESNET_FUSED_CACHE_DIR, by default in the user's cache
directory. It is written whole and renamed into place under a lock, so that a reader never sees half of it
and of two writers neither is lost. A file that cannot be read is a miss, with one warning; a directory that
cannot be written is one warning, and the choices hold for this process.
"""

import contextlib
import functools
import importlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from resnet_fused.version import __version__

try:
    import fcntl
except ImportError:  # not on Windows: the last writer wins there
    fcntl = None

_FORMAT = 1


class Key(NamedTuple):
    """What a measurement is true for."""

    device: str
    capability: str
    triton: str
    package: str

    @property
    def file_name(self) -> str:
        return re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(self)) + ".json"


class Choices(NamedTuple):
    """configurations: problem -> the numbers of a ``triton_kernels.configs.Config``; unfused: convolution
    -> whether the unfused path was faster."""

    configurations: dict[str, list[int]]
    unfused: dict[str, bool]


def directory() -> Path:
    """Where the files are: RESNET_FUSED_CACHE_DIR, else resnet_fused in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("RESNET_FUSED_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fused"


@functools.cache
def _device_key(index: int | None) -> Key:
    try:
        triton = importlib.import_module("triton").__version__
    except Exception:  # broken in whatever way: then there is nothing to look up either
        triton = "none"
    if index is None:
        return Key("interpreter", "0.0", triton, __version__)
    properties = torch.cuda.get_device_properties(index)
    return Key(properties.name, f"{properties.major}.{properties.minor}", triton, __version__)


def key() -> Key:
    """Of the current CUDA device; without one, of Triton's interpreter."""
    return _device_key(torch.cuda.current_device() if torch.cuda.is_available() else None)


_warned: set[str] = set()


def _warn_once(path: Path, message: str) -> None:
    if str(path) not in _warned:
        _warned.add(str(path))
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _parse(text: str, of: Key) -> Choices:
    """Raises ValueError, TypeError, KeyError or AttributeError for anything that is not :func:`_write`'s."""
    data = json.loads(text)
    if data["format"] != _FORMAT or data["key"] != list(of):
        raise ValueError("it is of another format, device or version")
    choices = Choices(data["configurations"], data["unfused"])
    for name, numbers in choices.configurations.items():
        # The seventh, a limit, may be 0; files from before it have six.
        if len(numbers) not in (6, 7) or not all(type(n) is int and n >= (i < 6) for i, n in enumerate(numbers)):
            raise ValueError(f"{name} has the configuration {numbers}")
    if not all(type(faster) is bool for faster in choices.unfused.values()):
        raise ValueError("a choice is neither true nor false")
    return choices


def read(path: Path, of: Key) -> Choices:
    """The choices in a file; none if it is not there or cannot be read."""
    try:
        return _parse(path.read_text(encoding="utf-8"), of)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_once(path, f"resnet_fused ignores its measured choices in {path}: {error}")
    return Choices({}, {})


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file, or dying, gives it back
        yield


def _write(path: Path, of: Key, choices: Choices) -> None:
    data = {"format": _FORMAT, "key": list(of), **choices._asdict()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def add(path: Path, of: Key, new: Choices) -> Choices:
    """Add choices to a file; returns all that it holds then."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            old = read(path, of)
            merged = Choices(
                {**old.configurations, **new.configurations}, {**old.unfused, **new.unfused}
            )
            _write(path, of, merged)
            return merged
    except OSError as error:
        _warn_once(path, f"resnet_fused cannot keep its measured choices in {path}: {error}")
        return new


# What this process has read, by file. Read once: a change by another process counts from the next start.
_loaded: dict[Path, Choices] = {}


def _current() -> Choices:
    of = key()
    path = directory() / of.file_name
    choices = _loaded.get(path)
    if choices is None:
        choices = _loaded[path] = read(path, of)
    return choices


def problem_name(problem: NamedTuple) -> str:
    """The name of a ``triton_kernels.configs.Problem`` in the file."""
    return " ".join(map(str, problem))


def convolution_name(primitive: str, dtype: torch.dtype, geometry: NamedTuple) -> str:
    """The name of a convolution (``dispatch.ConvGeometry``) in the file."""
    sizes = ("x".join(map(str, field)) for field in geometry[:5])
    return " ".join((primitive, str(dtype).removeprefix("torch."), *sizes, f"groups{geometry.groups}"))


def look_up(problem: NamedTuple):
    """The measured configuration of a problem, or None: for ``triton_kernels.configs.use_measured``."""
    numbers = _current().configurations.get(problem_name(problem))
    if numbers is None:
        return None
    return importlib.import_module("resnet_fused.triton_kernels.configs").Config(*numbers)


def prefers_unfused(primitive: str, dtype: torch.dtype, geometry: NamedTuple) -> bool | None:
    """Whether the unfused path was measured to be faster on the current device; None: it was not measured."""
    return _current().unfused.get(convolution_name(primitive, dtype, geometry))


def store(configurations: Mapping[NamedTuple, NamedTuple], unfused: Mapping[str, bool]) -> Path:
    """Keep choices for the current device, in this process and on disk; returns the file's path.

    Plans and dispatch choices that were made before keep theirs until they are made anew.
    """
    of = key()
    path = directory() / of.file_name
    new = Choices({problem_name(p): list(c) for p, c in configurations.items()}, dict(unfused))
    kept, now = add(path, of, new), _current()
    _loaded[path] = Choices(
        {**now.configurations, **kept.configurations}, {**now.unfused, **kept.unfused}
    )
    return path


def attach() -> None:
    """Let the Triton kernels ask here first. Called when the first of them is loaded."""
    importlib.import_module("resnet_fused.triton_kernels.configs").use_measured(look_up)
