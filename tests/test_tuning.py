"""The measured choices on disk, and in what order a call is timed. Nothing is measured here."""

import json
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
import torch

from resnet_fused.primitives import dispatch, tuner, tuning
from resnet_fused.primitives.tuning import Choices, Key
from resnet_fused.version import __version__

KEY = Key("NVIDIA H200", "9.0", "3.9.0", "0.1")
SOME = Choices({"sm_90 channel_stats": [64, 64, 1, 8, 1, 4]}, {"preact_conv_forward": True})


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_warned", set())
    monkeypatch.setattr(tuning, "_loaded", {})


def test_directory(monkeypatch, tmp_path):
    assert tuning.directory() == tmp_path
    monkeypatch.delenv("RESNET_FUSED_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuning.directory() == Path("/x/resnet_fused")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.directory() == Path.home() / ".cache" / "resnet_fused"


def test_there_and_back(tmp_path):
    path = tmp_path / "deep" / KEY.file_name
    assert tuning.read(path, KEY) == Choices({}, {})
    assert tuning.add(path, KEY, SOME) == SOME
    more = Choices({"sm_90 preact_apply": [1, 2, 3, 4, 5, 6]}, {"preact_conv_forward": False})
    merged = Choices({**SOME.configurations, **more.configurations}, more.unfused)
    assert tuning.add(path, KEY, more) == tuning.read(path, KEY) == merged
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


def test_key_names_device_and_versions():
    own = tuning.key()
    assert own.package == __version__
    if torch.cuda.is_available():
        assert own.device == torch.cuda.get_device_name() and "." in own.capability
    else:
        assert own.device == "interpreter"
    names = {KEY._replace(**{field: "other"}).file_name for field in Key._fields} | {KEY.file_name}
    assert len(names) == 5 and KEY.file_name == "NVIDIA_H200_9.0_3.9.0_0.1.json"


GOOD = {"format": 1, "key": list(KEY), "configurations": {}, "unfused": {}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "\x00\xff",
        json.dumps({**GOOD, "format": 2}),
        json.dumps({**GOOD, "key": ["another", "9.0", "3.9.0", "0.1"]}),
        json.dumps({**GOOD, "configurations": {"a": [1, 2, 3]}}),
        json.dumps({**GOOD, "configurations": {"a": [1, 2, 3, 4, 5, "6"]}}),
        json.dumps({**GOOD, "configurations": {"a": [1, 2, 3, 4, 5, 0]}}),
        json.dumps({**GOOD, "configurations": {"a": [1, 2, 3, 4, 5, 6, -1]}}),
        json.dumps({**GOOD, "configurations": {"a": [1, 2, 3, 4, 5, 6, 0, 0]}}),
        json.dumps({**GOOD, "configurations": {"a": 7}}),
        json.dumps({**GOOD, "configurations": []}),
        json.dumps({**GOOD, "unfused": {"a": 1}}),
        json.dumps({"format": 1, "key": list(KEY)}),
    ],
)
def test_corrupt_is_a_miss_with_one_warning(tmp_path, content):
    path = tmp_path / KEY.file_name
    path.write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match="ignores its measured choices") as told:
        assert tuning.read(path, KEY) == tuning.read(path, KEY) == Choices({}, {})
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.add(path, KEY, SOME) == tuning.read(path, KEY) == SOME


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / KEY.file_name
    with pytest.warns(RuntimeWarning, match="cannot keep its measured choices") as told:
        assert tuning.add(path, KEY, SOME) == tuning.add(path, KEY, SOME) == SOME
    assert len(told) == 1


def test_a_writer_that_fails_leaves_the_file_alone(tmp_path, monkeypatch):
    path = tmp_path / KEY.file_name
    tuning.add(path, KEY, SOME)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        tuning.add(path, KEY, Choices({}, {"b": True}))
    assert tuning.read(path, KEY) == SOME and not list(tmp_path.glob("*.tmp"))


def _writer(path: Path, number: int, start, failures) -> None:
    try:
        warnings.simplefilter("error")
        start.wait(60)
        for i in range(8):
            name = f"{number} {i}"
            tuning.add(path, KEY, Choices({name: [number + 1, 1, 1, 1, 1, 1]}, {f"{number}": True}))
            assert name in tuning.read(path, KEY).configurations
    except BaseException as error:
        failures.put(f"{number}: {type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def test_16_processes_on_one_cache(tmp_path):
    """None fails, none reads half a file, no choice is lost."""
    context = multiprocessing.get_context("fork")
    path, start, failures = tmp_path / KEY.file_name, context.Barrier(16), context.SimpleQueue()
    workers = [context.Process(target=_writer, args=(path, n, start, failures)) for n in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    told = []
    while not failures.empty():
        told.append(failures.get())
    assert not told and [worker.exitcode for worker in workers] == [0] * 16
    kept = tuning.read(path, KEY)
    assert len(kept.configurations) == 128 and len(kept.unfused) == 16


def test_choices_of_this_device():
    geometry = dispatch.ConvGeometry((2, 16, 8, 8), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    name = tuning.convolution_name("preact_conv_forward", torch.bfloat16, geometry)
    assert name == "preact_conv_forward bfloat16 2x16x8x8 16x16x3x3 1x1 1x1 1x1 groups1"
    assert not tuning.prefers_unfused("preact_conv_forward", torch.bfloat16, geometry)
    path = tuning.store({}, {name: True})
    assert path.name == tuning.key().file_name
    assert tuning.prefers_unfused("preact_conv_forward", torch.bfloat16, geometry)
    assert not tuning.prefers_unfused("preact_conv_forward", torch.float16, geometry)
    tuning._loaded.clear()  # as in another process
    assert tuning.prefers_unfused("preact_conv_forward", torch.bfloat16, geometry)
    tuning.store({}, {name: False})
    assert not tuning.prefers_unfused("preact_conv_forward", torch.bfloat16, geometry)


def test_configurations_of_this_device():
    configs = pytest.importorskip("resnet_fused.triton_kernels.configs")
    problem = configs.Problem("sm_90", "channel_stats", "16bit", "elementwise", 4096, 64, 1, True)
    config = configs.Config(32, 64, 1, 4, 1, 8)
    assert tuning.look_up(problem) is None
    tuning.store({problem: config}, {})
    assert tuning.look_up(problem) == config
    assert tuning.look_up(problem._replace(rows=4097)) is None
    limited = config._replace(registers=128)
    path = tuning.store({problem: limited}, {})
    tuning._loaded.clear()
    assert tuning.look_up(problem) == limited and tuning.read(path, tuning.key()).configurations


def test_launching_is_not_timed(monkeypatch):
    """The device is kept busy before the first event until the host has queued the call."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    scratch = torch.ones(4, dtype=torch.int8)
    assert tuner.samples_on_gpu(lambda: done.append("call"), 2, scratch) == [2e-3, 2e-3]
    assert done == ["wait", "event", "call", "event"] * 2 + ["synchronize"] and not scratch.any()
