"""The primitives as registered operators, their errors, and the choice of a backend."""

import os
import re
import subprocess
import sys

import pytest
import torch
from primitive_cases import activation, bn_rows

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.primitives import dispatch, reference


class TestRegistered:
    """The primitives as torch.ops.resnet_fused.*."""

    #: primitive, which argument, what it is instead, the message.
    WRONG = [
        ("channel_stats", 0, torch.zeros(3, 4), "expected 4D x (got 2D x)"),
        ("channel_stats", 0, torch.zeros(1, 3, 2, 2, dtype=torch.long), "a floating dtype, but got int64"),
        ("bn_act_forward", 1, torch.zeros(3, 3), "expected bn of size [4, 3], but got [3, 3]"),
        ("bn_act_forward", 1, torch.zeros(4, 3).double(), "bn to have dtype float32, but got float64"),
        ("bn_act_backward", 0, torch.zeros(2, 3, 5, 3), "expected da of size [2, 3, 5, 4] (x)"),
        ("bn_act_backward", 3, torch.zeros(2, 3, 5, 4).half(), "dz_in to have the dtype of x, float32, but"),
        ("bn_act_pool_forward", 0, torch.zeros(3, 4), "expected 4D x (got 2D x)"),
        ("bn_act_pool_forward", 0, torch.zeros(2, 3, 0, 4), "spatial size for its mean, but got 0x4"),
        ("bn_act_pool_forward", 1, torch.zeros(3, 3), "expected bn of size [4, 3], but got [3, 3]"),
        ("bn_act_pool_backward", 0, torch.zeros(2, 3, 5, 4), "expected dy of size [2, 3, 1, 1] (y), but got"),
        ("bn_act_pool_backward", 0, torch.zeros(2, 3, 1, 1).half(), "dy to have the dtype of y, float32"),
        ("bn_act_pool_backward", 1, torch.zeros(2, 3, 0, 4), "non-zero spatial size for its mean"),
        ("bn_act_pool_backward", 2, torch.zeros(4, 3).double(), "bn to have dtype float32, but got float64"),
        ("preact_apply", 3, torch.zeros(2, 3, 4, 5), "expected dskip of size"),
        ("preact_apply", 2, torch.zeros(4, 4), "expected coefficients of size [4, 3]"),
        ("preact_conv_forward", 1, torch.zeros(2, 3), "expected bn of size"),
        ("preact_conv_forward", 2, torch.zeros(6, 2, 3, 3), "to have 2 channels, but got 3 channels instead"),
        ("preact_conv_forward", 2, torch.zeros(6, 3, 9, 3), "Kernel size can't be greater than actual input"),
        ("preact_conv_forward", 2, torch.zeros(6, 3, 3, 3).half(), "weight to have dtype float32, but got"),
        ("preact_conv_forward", 3, torch.zeros(5), "expected bias of size [6]"),
        ("preact_conv_forward", 4, torch.zeros(2, 6, 5, 4), "expected residual of size [2, 6, 3, 2] (y)"),
        ("preact_conv_forward", 6, [0, 1], "non-positive stride"),
        ("preact_conv_forward", 7, [-1, 1], "negative padding"),
        ("preact_conv_dgrad", 0, torch.zeros(2, 5, 3, 2), "expected dy of size [2, 6, 3, 2] (y)"),
        ("preact_conv_dgrad", 8, [0, 0], "dilation should be greater than zero"),
        ("preact_conv_wgrad", 0, torch.zeros(2, 6, 5, 4), "expected dy of size"),
        ("preact_conv_wgrad", 3, torch.zeros(6, 3), "expected 4D weight (got 2D weight)"),
        ("preact_conv_backward_1x1", 1, torch.zeros(6, 3, 3, 3), "expected weight to be of a 1x1 kernel"),
        ("max_pool_forward", 0, torch.zeros(3, 4), "expected 4D x (got 2D x)"),
        ("max_pool_forward", 1, [17, 16], "expected kernel_size of 1 to 256 positions, but got (17, 16)"),
        ("max_pool_forward", 2, [0, 1], "stride should be greater than zero"),
        ("max_pool_forward", 3, [2, 0], "padding should be from 0 to half of the kernel size"),
        ("max_pool_forward", 1, [9, 3], "Calculated output size: (3x0x2). Output size is too small"),
        ("max_pool_backward", 0, torch.zeros(2, 3, 2, 2), "expected dy of size [2, 3, 3, 2] (y)"),
        ("max_pool_backward", 1, torch.zeros(2, 3, 3, 2), "offsets to have dtype uint8, but got float32"),
        ("max_pool_backward", 1, torch.zeros(2, 3, 3, 3).byte(), "expected offsets of size [2, 3, 3, 2]"),
        ("finalize_forward", 0, None, "expected stats, or running_mean and running_var"),
        ("finalize_forward", 4, torch.zeros(4), "expected weight of size [3]"),
        ("finalize_backward", 0, torch.zeros(3, 3), "expected sums of size [2, 3]"),
        ("update_running_stats", 1, torch.zeros(4), "expected running_var of size [3]"),
    ]

    @pytest.mark.parametrize(("name", "at", "instead", "message"), WRONG)
    def test_wrong_arguments(self, name, at, instead, message):
        args = list(self.arguments()[name])
        args[at] = instead
        with pytest.raises(RuntimeError, match=re.escape(message)):
            getattr(torch.ops.resnet_fused, name)(*args)

    @pytest.mark.parametrize(
        ("name", "at"),
        [
            ("bn_act_forward", 1),
            ("bn_act_pool_forward", 1),
            ("bn_act_pool_backward", 2),
            ("preact_conv_forward", 1),
            ("preact_conv_wgrad", 2),
        ],
    )
    def test_coefficients_of_any_strides(self, name, at):
        args = list(self.arguments()[name])
        expected = getattr(torch.ops.resnet_fused, name)(*args)
        args[at] = args[at].t().contiguous().t()
        torch.testing.assert_close(getattr(torch.ops.resnet_fused, name)(*args), expected, rtol=0, atol=0)

    def arguments(self):
        x, dy, bn = torch.randn(2, 3, 5, 4), torch.randn(2, 6, 3, 2), bn_rows(3, torch.float32)
        weight, geometry = torch.randn(6, 3, 3, 3), ([2, 2], [1, 1], [1, 1], 1)
        stats = torch.rand(2, 3)
        windows = [3, 3], [2, 2], [1, 1]
        pooled, offsets = reference.max_pool_forward(x, *windows)
        return {
            "channel_stats": (x,),
            "finalize_forward": (stats, 40, None, None, torch.randn(3), None, 1e-5),
            "bn_act_forward": (x, bn, 0.0),
            "bn_act_backward": (x, x, bn, x, 0.1),
            "bn_act_pool_forward": (x, bn, 0.1),
            "bn_act_pool_backward": (torch.randn(2, 3, 1, 1), x, bn, 0.1),
            "max_pool_forward": (x, *windows),
            "max_pool_backward": (pooled, offsets, [5, 4], *windows),
            "preact_conv_forward": (x, bn, weight, torch.randn(6), dy, 0.0, *geometry, True),
            "preact_conv_dgrad": (dy, weight, x, bn, None, 0.0, *geometry),
            "preact_conv_backward_1x1": (torch.randn(2, 6, 5, 4), weight[..., :1, :1], x, bn, x, 0.1, True),
            "preact_conv_wgrad": (dy, x, bn, weight, 0.0, *geometry, True),
            "finalize_backward": (stats, bn, 40, True),
            "preact_apply": (x, x, bn, x),
            "update_running_stats": (torch.zeros(3), torch.ones(3), stats, 40, 0.1),
        }

    @pytest.mark.parametrize("name", [n for n in primitives.__all__ if n != "residual_add"])
    def test_opcheck(self, name):
        args = self.arguments()[name]
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, args, test_utils=tests)

    def test_no_derivative(self):
        x = torch.randn(2, 3, 5, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match="channel_stats is a primitive and has no derivative"):
            torch.ops.resnet_fused.channel_stats(x).sum().backward()

    def test_autocast_leaves_them_alone(self):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = torch.ops.resnet_fused.preact_conv_forward(*self.arguments()["preact_conv_forward"])
        assert y.dtype == torch.float32


class TestDispatch:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match="unknown backend 'gpu', expected one of auto, reference, cpu"):
            rf.use_backend("gpu")

    @pytest.mark.parametrize(
        "name", ["cuda", *(["triton"] if dispatch.unavailable("triton") is not None else [])]
    )
    def test_unavailable(self, name):
        if dispatch.unavailable(name) is None:
            pytest.skip(f"{name} is available here")
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "):
            rf.use_backend(name)
        assert dispatch.current_backend() == "auto"

    def test_setter_and_context_manager(self):
        rf.use_backend("reference")
        try:
            assert dispatch.current_backend() == "reference"
            with rf.use_backend("unfused"):
                assert dispatch.current_backend() == "unfused"
            assert dispatch.current_backend() == "reference"
        finally:
            rf.use_backend("auto")

    def test_environment(self):
        code = "import resnet_fused.primitives.dispatch as d; print(d.current_backend())"
        for value, out, error in (("reference", "reference", ""), ("fast", "", "unknown backend 'fast'")):
            env = {**os.environ, "RESNET_FUSED_BACKEND": value}
            run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert run.stdout.strip() == out and error in run.stderr

    def test_record(self, cpu_library):
        x, bn = activation(1, 4, 3, 3, dtype=torch.float32), bn_rows(4, torch.float32)
        weight = torch.randn(4, 2, 1, 1)
        geometry = ((1, 1), (0, 0), (1, 1))
        with rf.record_dispatch() as log:
            primitives.channel_stats(x)
            primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *geometry, 2, False)
        assert [r.primitive for r in log] == ["channel_stats", "preact_conv_forward", "bn_act_forward"]
        assert [r.backend for r in log] == ["cpu", "unfused", "cpu"]
        assert log[1].reason == "the cpu kernels do not take groups=2" and log[1].shape == (1, 4, 3, 3)
        primitives.channel_stats(x)
        assert len(log) == 3

    def test_choose(self, cpu_library, monkeypatch):
        geometry = dispatch.ConvGeometry((2, 8, 4, 4), (8, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1)
        choose = dispatch.choose
        assert choose("preact_conv_forward", "cpu", torch.float32, geometry).backend == "cpu"
        assert choose("preact_conv_forward", "cpu", torch.float16, geometry).backend == "unfused"
        assert choose("channel_stats", "cpu", torch.float16).backend == "reference"
        assert choose("channel_stats", "xpu", torch.float32) == ("reference", "no kernels for xpu")
        with rf.use_backend("cpu"), pytest.raises(RuntimeError, match="the tensors are on cuda"):
            choose("channel_stats", "cuda", torch.float32)
        monkeypatch.setattr(dispatch, "prefer_unfused", lambda *a: True)
        choice = choose("preact_conv_forward", "cpu", torch.float32, geometry)
        assert choice.backend == "unfused" and "measured" in choice.reason
        with rf.use_backend("cpu"):
            assert choose("preact_conv_forward", "cpu", torch.float32, geometry).backend == "cpu"
