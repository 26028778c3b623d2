"""Which cases go to the Triton kernels, and what is said where they cannot. Nothing here runs a kernel."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import resnet_fused as rf
from resnet_fused import extension, primitives, triton_kernels
from resnet_fused.primitives import dispatch, tuning
from resnet_fused.primitives.preact_conv_backward_1x1 import has_kernel


def geometry(kernel=1, stride=1, groups=1, c=16, k=16):
    pad = kernel // 2
    return dispatch.ConvGeometry(
        (2, c, 8, 8), (k, c // groups, kernel, kernel), (stride,) * 2, (pad,) * 2, (1, 1), groups
    )


@pytest.fixture
def cuda_devices(monkeypatch, tmp_path):
    """As on a machine with a GPU that the kernels take, without CUDA C++ kernels, and with nothing measured."""
    monkeypatch.setattr(dispatch, "_OWN", {"cpu": ("cpu",), "cuda": ("triton",)})
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: None)
    monkeypatch.setattr(
        triton_kernels, "declines_device", lambda kind: None if kind == "cuda" else f"not {kind}"
    )
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    yield
    dispatch.forget()


def test_auto_takes_triton_for_cuda_tensors(cuda_devices):
    choose = dispatch.choose
    for primitive in primitives.__all__:
        shape = geometry() if "conv" in primitive else None
        choice = choose(primitive, "cuda", torch.bfloat16, shape)
        assert choice == ("triton", "triton kernel"), primitive
    assert choose("channel_stats", "cpu", torch.float32).backend != "triton"
    assert choose("channel_stats", "cuda", torch.float64).backend == "reference"
    assert choose("preact_conv_forward", "cuda", torch.float16, geometry(groups=2)) == (
        "unfused",
        "the triton kernels do not take groups=2",
    )
    assert choose("preact_conv_backward_1x1", "cuda", torch.bfloat16, geometry(3)).backend == "unfused"
    with rf.use_backend("unfused"):
        assert choose("preact_conv_forward", "cuda", torch.float16, geometry()).backend == "unfused"
        assert choose("bn_act_forward", "cuda", torch.float16).backend == "triton"
    with rf.use_backend("triton"):
        assert choose("preact_conv_dgrad", "cuda", torch.float16, geometry(3, 2)).backend == "triton"
        with pytest.raises(RuntimeError, match="backend 'triton' was asked for, but not cpu"):
            choose("channel_stats", "cpu", torch.float32)


def test_measured_choices(cuda_devices):
    name = tuning.convolution_name("preact_conv_forward", torch.bfloat16, geometry(3))
    tuning.store({}, {name: True})
    choice = dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, geometry(3))
    assert choice == ("unfused", "the unfused path was measured to be faster at this shape")
    for other in (geometry(3, 2), geometry(3, c=32)):
        assert dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, other).backend == "triton"
    assert dispatch.choose("preact_conv_dgrad", "cuda", torch.bfloat16, geometry(3)).backend == "triton"
    with rf.use_backend("triton"):
        choice = dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, geometry(3))
        assert choice.backend == "triton"


def test_every_primitive_has_its_kernel():
    if triton_kernels.unavailable() is not None:
        pytest.skip(triton_kernels.unavailable())
    for primitive in primitives.__all__:
        assert triton_kernels.load(primitive).__name__ == primitive


def test_kernels_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_failure", None)
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: "somewhere")

    def broken(name):
        raise AttributeError("module 'triton.language' has no attribute 'dot'")

    monkeypatch.setattr(triton_kernels.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="importing its kernels failed: AttributeError: .* 'dot'"):
        triton_kernels.load("channel_stats")
    assert "'dot'" in (triton_kernels.unavailable() or "")


@pytest.mark.skipif(triton_kernels.interpreted(), reason="the interpreter needs no driver")
def test_a_driver_that_does_not_start(monkeypatch):
    """As without a C compiler: told when the kernels are loaded, not at the first launch."""

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    modules = {"triton.runtime": SimpleNamespace(driver=Driver())}
    monkeypatch.setattr(triton_kernels, "_failure", None)
    monkeypatch.setattr(triton_kernels.importlib, "import_module", lambda name: modules.get(name))
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: "somewhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="starting its driver failed: RuntimeError: .*C compiler"):
        triton_kernels.load("channel_stats")
    assert "C compiler" in (triton_kernels.unavailable() or "")


def test_a_broken_triton_is_told_once_and_served_by_others(cuda_devices, monkeypatch):
    """As for a CUDA tensor, played by one that says so."""

    def broken(primitive):
        monkeypatch.setattr(triton_kernels, "unavailable", lambda: "it is broken")
        raise RuntimeError("it is broken")

    monkeypatch.setattr(triton_kernels, "load", broken)
    monkeypatch.setattr(dispatch, "_OWN", {"cpu": ("triton",)})
    monkeypatch.setattr(triton_kernels, "declines_device", lambda kind: None)
    monkeypatch.delitem(dispatch._implementations["channel_stats"], "triton", raising=False)
    dispatch.forget()
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with pytest.warns(RuntimeWarning, match="slower: it is broken"), rf.record_dispatch() as log:
        stats = primitives.channel_stats(x)
    assert log[0].backend == "reference" and log[0].reason == "it is broken"
    assert torch.allclose(stats[0], x.mean((0, 2, 3)), atol=1e-6)


@pytest.mark.skipif(triton_kernels.interpreted(), reason="the interpreter takes CPU tensors")
def test_combined_kernel_of_cpu_tensors(monkeypatch):
    x, weight = torch.randn(2, 16, 4, 4), torch.randn(8, 16, 1, 1)
    monkeypatch.delitem(dispatch._implementations["preact_conv_backward_1x1"], "cpu", raising=False)
    dispatch.forget()
    before = dict(dispatch._selected)
    assert not has_kernel(x, weight, (1, 1), (0, 0), (1, 1), 1)
    assert dispatch._selected == before  # without the C++ library: answered without a look-up
    monkeypatch.undo()
    dispatch.forget()
    assert has_kernel(x, weight, (1, 1), (0, 0), (1, 1), 1) == extension.cpu_available()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, resnet_fused; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_reason_without_a_device():
    if triton_kernels.unavailable() is not None:
        pytest.skip(triton_kernels.unavailable())
    code = "import resnet_fused as rf\nrf.use_backend('triton')"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    expected = "RuntimeError: backend 'triton' is not available: torch sees no CUDA device"
    assert run.stderr.strip().splitlines()[-1] == expected
