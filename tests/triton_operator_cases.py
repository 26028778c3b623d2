"""Whole operators, forward and backward, through the Triton primitives, by the checks that the other backends
have to pass. Collected by test_triton_kernels.py, like triton_cases.py."""

import conftest
import pytest
import test_preact_conv2d
import test_residual_add
import test_residual_unit
import torch
from primitive_cases import bn_rows
from test_primitive_operators import TestRegistered as Registered
from triton_cases import DEVICE, INTERPRETED

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.primitives import dispatch

CL = torch.channels_last
DTYPES = [torch.float16, *(() if INTERPRETED else (torch.bfloat16,))]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """The checks of the operators' own tests, with Triton as the only backend, and tensors where it wants
    them."""
    monkeypatch.setattr(conftest, "BACKENDS", ["triton"])
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with torch.device(DEVICE):
        yield
    torch.backends.cudnn.conv.fp32_precision = before


def ran_on(log):
    """primitive -> backends that ran it."""
    found = {}
    for record in log:
        found.setdefault(record.primitive, set()).add(record.backend)
    return found


def with_training(cases, in_eval, slow):
    """Every case in training, some in eval mode too; the interpreter leaves out those that are slow there and
    whose kernels others run."""
    cases = [case for case in cases if not INTERPRETED or case not in slow]
    return pytest.mark.parametrize(
        ("case", "training"), [*((case, True) for case in cases), *((case, False) for case in in_eval)]
    )


@with_training(
    test_residual_unit.UNITS, ["bottleneck, stride", "biases"], slow=["basic", "odd widths", "bottleneck"]
)
def test_residual_unit_on_triton(case, training):
    with rf.record_dispatch() as log:
        test_residual_unit.check_against_plain(
            test_residual_unit.unit(**test_residual_unit.UNITS[case], training=training)
        )
    ran = ran_on(log)
    declined = set()
    if case == "groups":
        declined = {"preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad"}
    assert {primitive for primitive, backends in ran.items() if backends != {"triton"}} == declined
    assert all(ran[primitive] == {"unfused"} for primitive in declined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_unit_in_half_precision(dtype):
    """16 bits, where the bottleneck's 1x1 convolutions have both gradients from one kernel."""
    with rf.record_dispatch() as log:
        test_residual_unit.check_on_average(
            lambda: test_residual_unit.unit(**test_residual_unit.UNITS["bottleneck"], dtype=dtype)
        )
    ran = ran_on(log)
    assert set.union(*ran.values()) == {"triton"} and "preact_conv_backward_1x1" in ran


@with_training(
    test_preact_conv2d.CASES, ["1x1"], slow=["3x3", "5x5", "1x1 stride 2", "depthwise", "one channel"]
)
def test_preact_conv2d_on_triton(case, training):
    options = test_preact_conv2d.CASES[case]
    with rf.record_dispatch() as log:
        test_preact_conv2d.check_against_plain(
            test_preact_conv2d.make(**options, training=training, residual=training), 0.1
        )
    ran = ran_on(log)
    assert ran["finalize_forward"] == ran["preact_apply"] == {"triton"}
    strided_and_dilated = case == "unequal"
    grouped = case in ("groups", "depthwise")
    assert ran["preact_conv_forward"] == {"unfused" if grouped else "triton"}
    assert ran["preact_conv_dgrad"] == {"unfused" if grouped or strided_and_dilated else "triton"}
    assert ("bn_act_forward" in ran) == grouped


@pytest.mark.parametrize(("affine", "gate"), test_residual_add.VARIANTS)
def test_residual_add_on_triton(affine, gate):
    for dtype in (torch.float32, *DTYPES):
        for alpha, slope in ((1.0, None), (-2.0, 0.1)):
            test_residual_add.test_against_plain(dtype, affine, gate, alpha, slope)


if INTERPRETED:  # the unit's own checks run under the CPU's autocast

    def test_autocast_with_float32_masters():
        with rf.record_dispatch() as log:
            test_residual_unit.check_on_average(
                lambda: test_residual_unit.unit(
                    "bottleneck", c=16, mid=8, dtype=torch.float16, parameters=torch.float32
                ),
                autocast=torch.float16,
            )
        ran = ran_on(log)
        assert set.union(*ran.values()) == {"triton"} and "preact_conv_backward_1x1" in ran


def test_float64_is_declined():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=CL)
    bn = torch.rand(4, 3, dtype=torch.float64)
    with rf.use_backend("triton"), rf.record_dispatch() as log:
        primitives.bn_act_forward(x, bn, 0.0)
    assert log[0].backend == "reference" and "float64" in log[0].reason


def test_other_devices_are_refused():
    with rf.use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for, but"):
        dispatch.choose("channel_stats", "xpu", torch.float32)


class TestBackward1x1:
    def arguments(self, c, k, dtype):
        x, dy, dz_in = (
            torch.randn(2, n, 5, 3).to(dtype).contiguous(memory_format=CL) for n in (c, k, c)
        )
        return dy, torch.randn(k, c, 1, 1).to(dtype), x, bn_rows(c, dtype), dz_in, 0.1, True

    @pytest.mark.parametrize(("c", "k"), [(16, 8), (35, 65)], ids=["one kernel", "declined"])
    def test_equals_the_two(self, c, k):
        """One kernel, or where it declines the two primitives: the same dz to the bit, the same sums to
        rounding."""
        args = self.arguments(c, k, torch.float16)
        dy, weight, x, bn, dz_in, slope, _ = args
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        with rf.use_backend("triton"), rf.record_dispatch() as log:
            dz, sums, dweight, dbias = primitives.preact_conv_backward_1x1(*args)
            expected = primitives.preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, *geometry)
            expected += primitives.preact_conv_wgrad(dy, x, bn, weight, slope, *geometry, True)
        assert log[0].primitive == "preact_conv_backward_1x1"
        assert log[0].backend == ("triton" if c == 16 else "unfused")
        assert torch.equal(dz, expected[0])
        for got, want in zip((sums, dweight, dbias), expected[1:], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4 * want.abs().max().item())


if not INTERPRETED:

    class TestOnTheDevice:
        """What only a device has: graphs, streams, and a host that could wait for it."""

        @pytest.fixture
        def step(self):
            """Forward and backward of a bottleneck with a projection; returns its output and gradients."""
            x, norms, convs, shortcut = test_residual_unit.unit(
                **test_residual_unit.UNITS["bottleneck, projection"], dtype=torch.bfloat16
            )
            leaves = [t for t in test_residual_unit.plain.tensors((x, convs)) if t.requires_grad]

            def run():
                out = rf.functional.residual_unit(x, norms, convs, shortcut=shortcut)
                return out.detach(), *torch.autograd.grad(out, leaves, out.detach())

            run()  # compiles, and makes the plans
            run.x = x
            return run

        def test_graph(self, step):
            expected = step()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for _ in range(2):
                for t in captured:
                    t.fill_(torch.nan)
                graph.replay()
                for got, want in zip(captured, expected, strict=True):
                    assert torch.equal(got, want)

        def test_side_stream(self, step):
            expected, x = step(), step.x.detach()
            right = x.clone()
            x.zero_()
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                torch.cuda._sleep(100_000_000)  # a kernel on another stream would read zeros meanwhile
                x.copy_(right)
                results = step()
            side.synchronize()
            for got, want in zip(results, expected, strict=True):
                assert torch.equal(got, want)

        def test_no_host_synchronisation(self, step):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(before)

        def test_bitwise_from_run_to_run(self, step):
            expected = step()
            for _ in range(20):
                for got, want in zip(step(), expected, strict=True):
                    assert torch.equal(got, want)

        @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
        def test_another_device_than_the_current(self):
            x = torch.randn(2, 16, 5, 4, device="cuda:1").contiguous(memory_format=CL)
            with rf.use_backend("triton"):
                stats = primitives.channel_stats(x)
            assert torch.cuda.current_device() == 0 and stats.device == x.device
            torch.testing.assert_close(stats[0], x.mean((0, 2, 3)))


@pytest.mark.parametrize("name", [n for n in primitives.__all__ if n != "residual_add"])
def test_opcheck(name):
    args = Registered().arguments()[name]
    with rf.use_backend("triton"):
        torch.library.opcheck(
            getattr(torch.ops.resnet_fused, name).default, args, test_utils=("test_schema", "test_faketensor")
        )


def test_measured_choices_are_honoured(tmp_path, monkeypatch):
    """tune times the candidates, stores the winner, and both the kernels and "auto" go by it."""
    from resnet_fused.primitives import tuner, tuning
    from resnet_fused.triton_kernels import configs, launch
    from resnet_fused.triton_kernels.preact_conv_forward import _plan

    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=CL)
    args = (x, bn_rows(16, torch.float32), torch.randn(16, 16, 3, 3), None, None, 0.0)
    args += ((1, 1), (1, 1), (1, 1), 1, False)
    order = iter(range(10, 0, -1))

    def timer(call):  # each faster than the one before
        call()
        return float(next(order))

    with rf.use_backend("triton"):
        y, _ = primitives.preact_conv_forward(*args)
        tuned = tuner.tune("preact_conv_forward", *args, timer=timer)
        problem, config, _ = tuned.candidates[-1]
        assert len({p for p, _, _ in tuned.candidates}) == 1 and tuned.unfused < tuned.fused
        assert tuning.look_up(problem) == config
        assert configs.select(
            launch.target(x.device), *problem[1:4], rows=problem.rows, columns=problem.columns,
            depth=problem.depth, aligned=problem.aligned,
        ) == config  # fmt: skip
        again, _ = primitives.preact_conv_forward(*args)
        torch.testing.assert_close(again, y)
        assert _plan.cache_info().currsize == 1
        with pytest.raises(ValueError, match="no configurations"):
            tuner.tune("finalize_backward", torch.ones(2, 3), torch.ones(4, 3), 3, True, timer=timer)
        with pytest.raises(ValueError, match="groups=2"):
            tuner.tune("preact_conv_forward", *args[:9], 2, False, timer=timer)
    geometry = dispatch.ConvGeometry((1, 16, 4, 4), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    choice = dispatch.choose("preact_conv_forward", "cuda", torch.float32, geometry)
    assert choice.backend == "unfused" and "measured" in choice.reason
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "other"))
    assert dispatch.choose("preact_conv_forward", "cuda", torch.float32, geometry).backend == "triton"
    assert tuning.look_up(problem) is None
