"""Part "cudnn" of ``python -m bench.gpu`` without a GPU. The graphs, as they are described to cuDNN, are run
by plain PyTorch in place of cuDNN's plans; and where the library is, cuDNN itself plans them for an H200 that
is not there."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench.gpu import __main__ as main  # noqa: E402
from bench.gpu import cases, cudnn_backend, cudnn_graphs, kernels, results, timing  # noqa: E402
from bench.gpu.cudnn_backend import CudnnError, Graph  # noqa: E402
from bench.gpu.nets import NETS, Layer, Net  # noqa: E402

from resnet_fused.primitives import reference  # noqa: E402

TINY = Net("preact_resnet29_cifar", 2, 8, 10)
CEILINGS = timing.Ceilings(1e9, 1e10)
MACHINE = dict(gpu="none", torch="2.15", triton="3.9", version="0.1", commit="abc", date="today")
LAYERS = {
    "3x3": Layer((2, 16, 9, 7), (8, 16, 3, 3), (1, 1), (1, 1), True, False, False),
    "3x3 s2": Layer((2, 8, 9, 7), (16, 8, 3, 3), (2, 2), (1, 1), True, False, False),
    "1x1": Layer((2, 16, 5, 6), (24, 16, 1, 1), (1, 1), (0, 0), True, False, False),
    "1x1 s2": Layer((2, 16, 5, 6), (24, 16, 1, 1), (2, 2), (0, 0), True, False, False),
}
#: What cuDNN (>= 9.11) asks of a device to plan for it.
H200 = dict(
    maxGridSize=[2147483647, 65535, 65535], maxBlockSize=[1024, 1024, 64], regsPerBlock=65536,
    multiProcessorCount=132, smCountOrigin=0, warpSize=32, maxSharedMemoryPerBlock=49152,
    maxSharedMemoryPerBlockOptin=232448, oversizedSharedMemoryPerBlock=232448, reservedSharedMemoryPerBlock=1024,
    maxRegistersPerSM=65536, maxCtasPerSM=32, maxThreadsPerBlock=1024, maxThreadsPerSM=2048, pciDeviceId=9013,
    isTccDriver=0, supportCoopLaunch=1, totalGlobalMem=150754820096, smClockRateKHz=1980000,
    memClockRateKHz=3201000, l2CacheSize=62914560, cudaDeviceId=0, deviceName="NVIDIA H200", deviceVer=900,
    driverVer=13000,
)  # fmt: skip


class TorchPlan:
    """A graph run by plain PyTorch in float32, each stored tensor rounded once."""

    name, workspace = "plain", 0

    def __init__(self, graph):
        self.graph = graph

    def bind(self, tensors, workspace):
        cudnn_backend.check_tensors(self.graph, tensors)
        return lambda: self.run(tensors)

    def run(self, tensors):
        values = {}

        def read(spec):
            return (tensors[spec.name] if spec.name in tensors else values[spec.uid]).float().view(spec.shape)

        for kind, specs, geometry in self.graph.operations:
            names = [spec.name for spec in specs]
            written = {"channel_sums": 2, "norm_weight_gradients": 5}.get(kind, 1)
            reads, writes = specs[:-written], specs[-written:]
            outputs = apply(kind, [read(spec) for spec in reads], writes, geometry)
            assert len(outputs) == len(writes) and all(name in tensors for name in names if name)
            for spec, value in zip(writes, outputs, strict=True):
                if spec.name:
                    tensors[spec.name].copy_(value.view(tensors[spec.name].shape))
                else:
                    values[spec.uid] = value


def apply(kind, reads, writes, geometry):
    if kind in ("add", "mul", "sub"):
        return [getattr(torch, kind)(*reads)]
    if kind == "relu":
        return [reads[0].relu()]
    if kind == "relu_backward":
        return [torch.where(reads[1] > 0, reads[0], 0.0)]
    if kind == "convolution":
        return [F.conv2d(*reads, None, *geometry)]
    if kind == "input_gradient":
        return [torch.nn.grad.conv2d_input(writes[0].shape, reads[1], reads[0], *geometry)]
    if kind == "weight_gradient":
        return [torch.nn.grad.conv2d_weight(reads[1], writes[0].shape, reads[0], *geometry)]
    if kind == "channel_sums":
        return [reads[0].sum((0, 2, 3)), reads[0].square().sum((0, 2, 3))]
    assert kind == "norm_weight_gradients"
    dz, x, mean, invstd, gamma = reads
    dbeta, dgamma = dz.sum((0, 2, 3), True), (dz * (x - mean) * invstd).sum((0, 2, 3), True)
    count = dz.numel() // dz.shape[1]
    a, b = gamma * invstd, -gamma * invstd.square() * dgamma / count
    return [dgamma, dbeta, a, b, -b * mean - a * dbeta / count]


def plain(graph):
    return [TorchPlan(graph)], []


def prepared(primitive, layer):
    return cases.Prepared(cases.Case(primitive, layer, layer.input, {}, torch.float16), "cpu")


@pytest.fixture(scope="module")
def timer():
    return timing.Timer("cpu", seconds=0.0, rounds=(2, 2))


@pytest.mark.parametrize(
    ("primitive", "layer"),
    [
        pytest.param(primitive, layer, id=f"{primitive} {name}")
        for primitive in cudnn_graphs.PRIMITIVES
        for name, layer in LAYERS.items()
        if layer.pointwise or primitive != "preact_conv_backward_1x1"
    ],
)
class TestGraphs:
    def test_what_a_graph_says_is_what_the_primitive_does(self, primitive, layer, timer):
        row = cudnn_graphs.columns(prepared(primitive, layer), timer, plain)
        assert "cudnn_declined" not in row, row
        assert (
            0 < row["cudnn_p20_us"] <= row["cudnn_p50_us"] <= row["cudnn_p80_us"] and row["cudnn_host_us"] > 0
        )
        count = 2 if primitive == "preact_conv_backward_1x1" else 1
        assert row["cudnn_plan"] == " + ".join(["plain, plan 1 of 1"] * count)

    @pytest.mark.parametrize("wrong", ["swapped", "unwritten", "doubled", "flipped"])
    def test_a_wrong_graph_is_told(self, primitive, layer, timer, wrong):
        """Two tensors that are interchanged, an output that is not written, one that is off by a factor, an
        input whose columns are in another order: none is timed."""

        class Wrong(TorchPlan):
            def run(self, tensors):
                last = next(name for name in ("squares", "dbeta", "dweight") if name in tensors)
                given, kept = dict(tensors), tensors[last].clone()
                if wrong == "swapped":
                    a, b = ("mean", "beta") if "mean" in tensors else ("scale", "shift")
                    given[a], given[b] = tensors[b], tensors[a]
                if wrong == "flipped":
                    given["x"] = given["x"].flip(3)
                super().run(given)
                if wrong == "unwritten":
                    tensors[last].copy_(kept)
                if wrong == "doubled":
                    tensors[last].mul_(2)

        row = cudnn_graphs.columns(prepared(primitive, layer), timer, lambda graph: ([Wrong(graph)], []))
        assert list(row) == ["cudnn_declined"] and row["cudnn_declined"].startswith(
            "AssertionError: cuDNN's"
        ), row


class TestMapping:
    def test_statistics_of_the_sums(self):
        """(sum, sum of squares) and (mean, M2) tell the same."""
        y = torch.randn(2, 4, 5, 6) + 1
        (total, squares), n = apply("channel_sums", [y], [], ()), 60
        torch.testing.assert_close(
            torch.stack((total / n, squares - total.square() / n)), reference.channel_stats(y)
        )

    def test_coefficients_are_those_of_finalize_backward(self):
        x, dz = torch.randn(2, 2, 3, 4, 5).unbind()
        gamma, beta = torch.rand(3) + 0.5, torch.randn(3)
        bn = reference.finalize_forward(reference.channel_stats(x), 40, None, None, gamma, beta, 1e-5)
        rows = [row.view(1, -1, 1, 1) for row in (bn[0], bn[1], gamma)]
        dgamma, dbeta, a, b, c = apply("norm_weight_gradients", [dz, x, *rows], [], ())
        sums = torch.stack((dbeta.flatten(), dgamma.flatten()))
        ours = reference.preact_apply(dz, x, reference.finalize_backward(sums, bn, 40, True), None)
        torch.testing.assert_close(a * dz + b * x + c, ours)

    def test_scale_and_shift_are_rounded_as_cudnn_reads_them(self):
        case = prepared("preact_conv_wgrad", LAYERS["3x3"])
        dy, x, bn, *rest = cudnn_graphs.as_cudnn_takes_it("preact_conv_wgrad", case.args)
        assert dy is case.args[0] and x is case.args[1] and torch.equal(bn[:2], case.args[2][:2])
        assert torch.equal(bn[2:], case.args[2][2:].half().float()) and not torch.equal(bn, case.args[2])
        dgrad = prepared("preact_conv_dgrad", LAYERS["3x3"])
        assert cudnn_graphs.as_cudnn_takes_it("preact_conv_dgrad", dgrad.args) is dgrad.args

    def test_relu_at_zero_may_fall_on_either_side(self, timer):
        """z = 0 up to rounding: dz may be there what it likes, and nowhere else."""
        case = prepared("preact_conv_dgrad", LAYERS["1x1"])
        mean, var, gamma, beta = case.norm
        x = case.args[2]
        beta.copy_((mean - x[0, :, 0, 0].float()) * case.args[3][2])
        case.args[3].copy_(reference.finalize_forward(None, 0, mean, var, gamma, beta, 1e-5))
        found = cudnn_graphs.tensors("preact_conv_dgrad", case)
        TorchPlan(cudnn_graphs.dgrad(case.case.layer, torch.float16)).run(found)
        found["dz"][0, :, 0, 0] += 1
        xhat = (x.float() - mean.view(1, -1, 1, 1)) * case.args[3][1].view(1, -1, 1, 1)
        found["dbeta"].copy_(found["dz"].float().sum((0, 2, 3), True))
        found["dgamma"].copy_((found["dz"] * xhat).sum((0, 2, 3), True))
        cudnn_graphs.verify("preact_conv_dgrad", case, found)
        found["dz"][0, :, 0, 1] += 1
        with pytest.raises(AssertionError, match="cuDNN's preact_conv_dgrad: error"):
            cudnn_graphs.verify("preact_conv_dgrad", case, found)


class TestTensors:
    def graph(self):
        graph = Graph()
        graph.tensor((2, 8, 3, 3), "x", torch.float16)
        graph.row(8, "scale")
        return graph

    @pytest.mark.parametrize(
        ("name", "tensor", "told"),
        [
            ("y", torch.zeros(8), "'y' is not in the graph"),
            ("x", None, "'x' is missing"),
            ("x", torch.zeros(2, 8, 3, 3), "'x' is torch.float32"),
            (
                "x",
                torch.zeros(2, 8, 3, 4, dtype=torch.float16),
                r"\(2, 8, 3, 4\), the graph has torch.float16",
            ),
            ("x", torch.zeros(2, 8, 3, 3, dtype=torch.float16), "'x' is not channels_last"),
            ("scale", torch.zeros(9)[1:], "'scale' is not channels_last or not aligned"),
        ],
    )
    def test_refused(self, name, tensor, told):
        x = torch.zeros(2, 8, 3, 3, dtype=torch.float16).to(memory_format=torch.channels_last)
        tensors = {"x": x, "scale": torch.zeros(8)}
        cudnn_backend.check_tensors(self.graph(), tensors)
        tensors = {k: v for k, v in {**tensors, name: tensor}.items() if v is not None}
        with pytest.raises(CudnnError, match=told):
            cudnn_backend.check_tensors(self.graph(), tensors)

    def test_library_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(cudnn_backend, "SONAME", "libcudnn.so.nowhere")
        cudnn_backend.library.cache_clear()
        try:
            assert cudnn_backend.unavailable().startswith("no libcudnn.so.nowhere with the graph API: ")
        finally:
            cudnn_backend.library.cache_clear()


class TestChoice:
    def plans(self, *kinds):
        """Plans that are slow, fail, or are wrong."""

        class Played(TorchPlan):
            def __init__(self, graph, kind):
                super().__init__(graph)
                self.name = self.kind = kind

            def bind(self, tensors, workspace):
                if self.kind == "refused":
                    raise CudnnError("cudnnBackendFinalize: CUDNN_STATUS_BAD_PARAM")
                return super().bind(tensors, workspace)

            def run(self, tensors):
                if self.kind == "failing":
                    raise CudnnError("cudnnBackendExecute: CUDNN_STATUS_EXECUTION_FAILED")
                if self.kind == "slow":
                    time.sleep(0.02)
                super().run(tensors)
                if self.kind == "wrong":
                    tensors["dweight"].zero_()

        return lambda graph: (
            [Played(graph, kind) for kind in kinds],
            ["engine 7: CUDNN_STATUS_NOT_SUPPORTED"],
        )

    def choose(self, timer, *kinds):
        case = prepared("preact_conv_wgrad", LAYERS["1x1"])
        return cudnn_graphs.choose("preact_conv_wgrad", case, timer, self.plans(*kinds)).name

    def test_the_fastest_that_is_right(self, timer):
        found = self.choose(timer, "slow", "failing", "refused", "wrong", "right")
        assert found == "right, plan 5 of 5"

    def test_reasons(self, timer):
        with pytest.raises(CudnnError, match=r"^engine 7: CUDNN_STATUS_NOT_SUPPORTED$"):
            self.choose(timer)
        with pytest.raises(
            CudnnError, match="NOT_SUPPORTED; cudnnBackendExecute: CUDNN_STATUS_EXECUTION_FAILED$"
        ):
            self.choose(timer, "failing")
        with pytest.raises(AssertionError, match="EXECUTION_FAILED; cuDNN's preact_conv_wgrad: error"):
            self.choose(timer, "failing", "wrong")

    def test_no_exception_of_a_peer_stops_a_run(self, timer):
        def broken(graph):
            raise KeyError("nothing\nhere")

        row = cudnn_graphs.columns(prepared("preact_conv_wgrad", LAYERS["1x1"]), timer, broken)
        assert row == {"cudnn_declined": r"KeyError: 'nothing\nhere'"}


@pytest.mark.usefixtures("one_thread")
class TestPart:
    def test_cases(self):
        found = cases.cudnn_cases([NETS["resnetv2_50"]])
        assert all(c.dtype == torch.float16 and c.layer.preact and not c.layer.residual for c in found)
        assert len({case.name for case in found}) == len(found) and all(
            c.name.endswith(" fp16") for c in found
        )
        forward = [c for c in found if c.primitive == "preact_conv_forward"]
        assert sum(sum(c.nets.values()) for c in forward) == 52
        assert {c.primitive for c in found} == set(cudnn_graphs.PRIMITIVES)

    def test_columns_go_on_and_summary(self, tmp_path, timer):
        def columns(prepared, timer):
            if prepared.case.primitive == "preact_conv_wgrad":
                return cudnn_graphs.columns(prepared, timer, lambda graph: ([], ["none"]))
            return cudnn_graphs.columns(prepared, timer, plain)

        few = list({c.primitive: c for c in cases.cudnn_cases([TINY])}.values())
        part, told = results.Part("cudnn", MACHINE, tmp_path), []
        args = (part, few, "cpu", timer, CEILINGS)
        assert kernels.run(*args, time.monotonic() - 1, say=told.append, peer=columns) == 0
        assert "cudnn: out of time with 0 of 4 rows" in told[0] and not part.complete
        assert kernels.run(*args, time.monotonic() + 600, say=told.append, peer=columns) == 0, told
        rows = {row["primitive"]: row for row in json.loads(part.path.read_text())["rows"]}
        assert part.complete and part.path.name == "gpu-cudnn-cpu.json" and len(rows) == 4
        for primitive, row in rows.items():
            assert row["fused_p50_us"] > 0 and row["unfused_p50_us"] > 0 and row["eager_p50_us"] > 0
            assert ("cudnn_declined" if primitive == "preact_conv_wgrad" else "cudnn_p50_us") in row
        lines = {line.split()[0]: line for line in told[-1].splitlines()}
        assert lines["preact_conv_wgrad"].endswith(", no cuDNN graph in 1: CudnnError: none")
        assert ", cuDNN's graph / fused: median " in lines["preact_conv_dgrad"]

    def test_measured_once_for_all_backends(self, tmp_path, monkeypatch):
        asked = []

        def measure(case, device, timer, ceilings, tune, backend, peer):
            row = {"name": kernels.row_name(case, backend), "primitive": case.primitive, "backend": backend}
            return row if peer is None else {**row, **peer(case, timer)}

        def peer(case, timer):
            asked.append(case)
            return {"cudnn_p50_us": 2.0}

        monkeypatch.setattr(kernels, "measure", measure)
        monkeypatch.setattr(kernels, "backends", lambda device: ("triton", "cuda"))
        part, few = results.Part("cudnn", MACHINE, tmp_path), cases.cudnn_cases([TINY])[:2]
        kernels.run(part, few, "cpu", None, CEILINGS, time.monotonic() + 60, say=lambda line: None, peer=peer)
        assert asked == few and [row["cudnn_p50_us"] for row in part.rows] == [2.0] * 4

    def test_command(self, tmp_path, monkeypatch, capsys):
        assert "cudnn" in main.parse([]).parts and "cudnn" not in main.parse(["--no-cudnn"]).parts
        done = []
        monkeypatch.setattr(main, "no_gpu", lambda: None)
        monkeypatch.setattr(main, "prepare", lambda: None)
        monkeypatch.setattr(
            main, "warm_in_processes", lambda part, names, deadline: done.append((part, names))
        )
        monkeypatch.setattr(results, "describe", lambda device: MACHINE)
        monkeypatch.setattr(results.Part.__init__, "__defaults__", (tmp_path, False))
        monkeypatch.setattr(timing, "Timer", lambda device: None)
        monkeypatch.setattr(timing.Ceilings, "measure", lambda timer: CEILINGS)
        monkeypatch.setattr(
            kernels,
            "run",
            lambda part, chosen, *args, peer: done.append((len(chosen), peer, part.data["cudnn"])) or 0,
        )
        monkeypatch.setattr(cudnn_backend, "unavailable", lambda: "not installed")
        assert main.main(["cudnn"]) == 0 and not done
        assert "cudnn: left out: not installed" in capsys.readouterr().out
        monkeypatch.setattr(cudnn_backend, "unavailable", lambda: None)
        monkeypatch.setattr(cudnn_backend, "version", lambda: "9.26.0")
        assert main.main(["cudnn"]) == 0
        count = len(cases.cudnn_cases([NETS["resnetv2_50"]]))
        assert done == [("cudnn", ["resnetv2_50"]), (count, cudnn_graphs.columns, "9.26.0")]


def no_planning() -> str | None:
    why = cudnn_backend.unavailable()
    if why is None and cudnn_backend.library().cudnnGetVersion() < 91100:
        why = "cuDNN before 9.11 plans for devices that are there only"
    return why


@pytest.mark.skipif(no_planning() is not None, reason=str(no_planning()))
class TestPlanning:
    """cuDNN's own library: what it proposes for an H200, down to the plan, which is then compiled."""

    @pytest.fixture
    def h200(self):
        return cudnn_backend.device_properties(json.dumps(H200))

    @pytest.mark.parametrize("name", cudnn_graphs.GRAPHS)
    def test_every_layer_of_resnetv2_50_in_float16(self, name, h200):
        layers = {case.layer for case in cases.cudnn_cases([NETS["resnetv2_50"]])}
        for layer in layers:
            found, reasons = cudnn_backend.plans(
                cudnn_graphs.GRAPHS[name][0](layer, torch.float16), None, h200
            )
            assert found, f"{layer}: {reasons}"
            assert all(plan.workspace >= 0 and plan.name.startswith("engine ") for plan in found)

    @pytest.mark.parametrize("name", cudnn_graphs.GRAPHS)
    def test_none_in_bfloat16(self, name, h200):
        graph = cudnn_graphs.GRAPHS[name][0](LAYERS["3x3"], torch.bfloat16)
        assert cudnn_backend.plans(graph, None, h200) == (
            [],
            ["cuDNN's heuristics propose no engine for this graph"],
        )

    @pytest.mark.parametrize("name", ["preact_conv_forward", "preact_conv_wgrad"])
    def test_none_with_scale_and_shift_in_float32(self, name, h200, monkeypatch):
        """Why they are rounded (``as_cudnn_takes_it``)."""
        normalized = cudnn_graphs._normalized
        monkeypatch.setattr(
            cudnn_graphs, "_normalized", lambda graph, x, dtype: normalized(graph, x, torch.float32)
        )
        assert not cudnn_backend.plans(
            cudnn_graphs.GRAPHS[name][0](LAYERS["3x3"], torch.float16), None, h200
        )[0]

    def test_what_cudnn_says_is_told(self, h200):
        with pytest.raises(CudnnError, match=r"finalize\(38\): CUDNN_STATUS_BAD_PARAM: .*maxGridSize"):
            cudnn_backend.device_properties("{}")
