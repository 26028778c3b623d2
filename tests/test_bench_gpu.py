"""``python -m bench.gpu`` without a GPU: its arithmetic, its files, how it goes on, and its parts on the CPU
with tiny nets."""

import csv
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench.gpu import __main__ as main  # noqa: E402
from bench.gpu import cases, correctness, cudnn_backend, kernels, nets, results, sanitizer, steps, timing  # noqa: E402
from bench.gpu.nets import NETS, Layer, Net, StagedNet  # noqa: E402

from cuda_emulation import OnDevice  # noqa: E402

import resnet_fused as rf  # noqa: E402
from resnet_fused import primitives  # noqa: E402
from resnet_fused.primitives import dispatch  # noqa: E402

TINY = Net("preact_resnet29_cifar", 2, 8, 10)
CEILINGS = timing.Ceilings(1e9, 1e10)
MACHINE = dict(gpu="none", torch="2.15", triton="3.9", version="0.1", commit="abc", date="today")


@pytest.fixture(scope="module")
def timer():
    return timing.Timer("cpu", seconds=0.0, rounds=(2, 2))


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_one_line_and_status_2(self):
        run = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 2 and not run.stdout
        assert run.stderr == "bench.gpu: there is no GPU to measure on: torch sees no CUDA device\n"

    def test_arguments(self, capsys):
        assert main.parse([]).parts == ["correctness", "sanitizer", "kernels", "steps", "cudnn"]
        found = main.parse(["steps", "correctness", "--force", "--budget", "9"])
        assert found.parts == ["correctness", "steps"] and found.force and found.budget == 9
        with pytest.raises(SystemExit) as exit:
            main.parse(["speed"])
        assert exit.value.code == 2 and "unknown part 'speed'" in capsys.readouterr().err

    def test_parts_that_are_complete_are_left_out(self, tmp_path, monkeypatch, capsys):
        """Played: as on a machine with a GPU, with parts that do nothing but finish."""
        done = []

        def played(name, wrong=0):
            def run(part, *args, **kwargs):
                done.append(name)
                part.add({"name": "row"})
                part.finish()
                return wrong

            return run

        monkeypatch.setattr(main, "no_gpu", lambda: None)
        monkeypatch.setattr(main, "warm_in_processes", lambda part, names, deadline: done.append(names))
        monkeypatch.setattr(main, "prepare", lambda: None)
        monkeypatch.setattr(results, "describe", lambda device: MACHINE)
        monkeypatch.setattr(results.Part.__init__, "__defaults__", (tmp_path, False))
        monkeypatch.setattr(timing, "Timer", lambda device: None)
        monkeypatch.setattr(timing.Ceilings, "measure", lambda timer: CEILINGS)
        monkeypatch.setattr(correctness, "run", played("correctness"))
        monkeypatch.setattr(kernels, "run", played("kernels", wrong=2))
        monkeypatch.setattr(steps, "run", played("steps"))
        monkeypatch.setattr(cudnn_backend, "unavailable", lambda: "not installed")
        assert main.main(["correctness", "kernels", "--nets", "wrn28_10"]) == 1
        assert done == ["correctness", ["wrn28_10"], "kernels"]
        assert main.main(["--nets", "wrn28_10"]) == 0 and done[3:] == ["steps"]
        assert "kernels: complete in gpu-kernels-cpu.json; --force measures anew" in capsys.readouterr().out
        assert main.main(["steps", "--force"]) == 0 and done[4:] == ["steps"]
        assert main.main(["--nets", "vgg"]) == 2 and "unknown net 'vgg'" in capsys.readouterr().err

    def test_budgets_are_below_9_minutes(self):
        assert sum(main.BUDGETS.values()) < 9 * 60


class TestNets:
    def test_convolutions(self):
        """As many as the name says, plus the projections, less the linear layer."""
        expected = {
            "preact_resnet164_cifar": 163 + 3, "wrn28_10": 25 + 3, "resnetv2_50": 49 + 4,
            "preact_resnet1001_cifar": 1000 + 3,
        }  # fmt: skip
        for name, count in expected.items():
            layers = nets.layers_of(NETS[name])
            assert sum(layers.values()) == count
            assert all(layer.input[0] == NETS[name].batch for layer in layers)
            assert sum(n for layer, n in layers.items() if layer.image) == 1

    def test_multiplications(self):
        """Of the papers' tables: 5.2 GFLOP (multiply-adds) an image of WRN-28-10, 3.8 of ResNet-50."""
        for name, billions in (("wrn28_10", 5.2), ("resnetv2_50", 3.8)):
            layers = nets.layers_of(NETS[name])
            total = sum(layer.flops * count for layer, count in layers.items()) / 2 / NETS[name].batch
            assert total / 1e9 == pytest.approx(billions, rel=0.03)

    def test_layer(self):
        layer = Layer((2, 8, 9, 7), (16, 8, 3, 3), (2, 2), (1, 1), True, True, False)
        assert layer.output == (2, 16, 5, 4) and not layer.pointwise
        assert layer.flops == 2 * (2 * 16 * 5 * 4) * (8 * 9)
        assert str(layer) == "2x8x9x7 16x8x3x3 s2 +residual"

    @pytest.mark.parametrize("stem", [(8, 3, 1), (8, 7, 2)])
    def test_fused_and_plain_are_the_same_net(self, stem):
        fused, plain = (StagedNet(stem, "bottleneck", (4, 8), (2, 1), 5, fused) for fused in (True, False))
        plain.load_state_dict(fused.state_dict())
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


class TestArithmetic:
    def test_floor(self):
        ceilings = timing.Ceilings(bandwidth=4e12, flops=8e14)
        assert ceilings.floor(4_000_000, 0) == 1e-6
        assert ceilings.floor(4_000_000, 16 * 10**8) == 2e-6

    def test_ceilings_are_measured(self, timer):
        ceilings = timing.Ceilings.measure(timer, megabytes=1, side=64)
        assert 0 < ceilings.bandwidth < 1e13 and 0 < ceilings.flops < 1e15

    def test_bytes_and_operations(self):
        layer = Layer((2, 8, 4, 4), (16, 8, 1, 1), (1, 1), (0, 0), True, True, False)
        x, y, w = 2 * 8 * 16, 2 * 16 * 16, 16 * 8
        expected = {
            "preact_conv_forward": x + 2 * y + w,
            "preact_conv_dgrad": y + 2 * x + w,
            "preact_conv_wgrad": y + x + w,
            "preact_conv_backward_1x1": y + 2 * x + 2 * w,
        }
        for name, values in expected.items():
            case = cases.Case(name, layer, layer.input, {})
            assert case.bytes == 2 * values
            assert case.flops == 2 * y * 8 * (2 if name.endswith("1x1") else 1)
        for name, passes in zip((*cases.PASSES, *cases.POOLS), (1, 2, 3, 4, 3, 1, 2), strict=True):
            assert cases.Case(name, None, layer.input, {}).bytes == 2 * x * passes

    def test_cases(self):
        found = cases.cases(list(NETS.values()))
        assert len({case.name for case in found}) == len(found)
        assert {case.primitive for case in found} == {*cases.CONVOLUTIONS, *cases.PASSES, *cases.POOLS}
        pools = {case.shape: case.nets for case in found if case.primitive in cases.POOLS}
        assert pools[128, 256, 8, 8] == {"preact_resnet164_cifar": 1, "preact_resnet1001_cifar": 1}
        stems = [case for case in found if case.layer is not None and case.layer.image]
        assert {case.primitive for case in stems} == {"preact_conv_forward"}
        shared = next(c for c in found if c.name == "preact_conv_wgrad 128x16x32x32 16x16x3x3 s1")
        assert shared.nets == {"preact_resnet164_cifar": 18, "preact_resnet1001_cifar": 111}


class TestPart:
    def test_goes_on_and_starts_over(self, tmp_path):
        part = results.Part("kernels", MACHINE, tmp_path)
        assert part.path.name == "gpu-kernels-cpu.json" and not part.complete
        part.add({"name": "a", "p50": 1.5})
        again = results.Part("kernels", MACHINE, tmp_path)
        assert again.has("a") and not again.has("b") and not again.complete
        again.add({"name": "b", "error": "x"})
        again.finish()
        assert results.Part("kernels", {**MACHINE, "date": "tomorrow"}, tmp_path).complete
        for other in ({"commit": "def"}, {"gpu": "NVIDIA H200"}, {"triton": "4"}):
            assert not results.Part("kernels", {**MACHINE, **other}, tmp_path).rows
        assert not results.Part("kernels", MACHINE, tmp_path, force=True).rows
        rows = list(csv.DictReader(open(again.path.with_suffix(".csv"))))
        assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["commit"] == "abc"
        assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".json"]

    @pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', "null"])
    def test_unreadable_results_are_none(self, tmp_path, content):
        (tmp_path / "gpu-steps-nvidia-h200.json").write_text(content)
        assert not results.Part("steps", {**MACHINE, "gpu": "NVIDIA H200"}, tmp_path).rows

    def test_machine(self):
        machine = results.describe("cpu")
        assert machine["torch"] == torch.__version__ and set(results._SAME) <= set(machine)


@pytest.mark.usefixtures("one_thread")
class TestKernels:
    def test_all_cases_on_the_cpu(self, tmp_path, timer):
        """Every way of every primitive runs and is verified; what a deadline cut off is measured later."""
        chosen = cases.cases([TINY])
        # Every primitive at its first and its last layer: the others differ in sizes only.
        few = {c.primitive: c for c in reversed(chosen)} | {f"{c.primitive} ": c for c in chosen}
        few = list({case.name: case for case in few.values()}.values())
        part, told = results.Part("kernels", MACHINE, tmp_path), []
        args = (part, few, "cpu", timer, CEILINGS)
        assert kernels.run(*args, deadline=time.monotonic() - 1, say=told.append) == 0
        assert not part.rows and not part.complete and "out of time with 0 of" in told[0]
        assert kernels.run(*args, deadline=time.monotonic() + 600, say=told.append) == 0, told
        assert part.complete and [row["name"] for row in part.rows] == [case.name for case in few]
        for row, case in zip(part.rows, few, strict=True):
            assert row["floor_us"] == pytest.approx(1e6 * CEILINGS.floor(case.bytes, case.flops), abs=0.01)
            assert row["share"] == pytest.approx(row["floor_us"] / row["fused_p50_us"], rel=0.02)
            assert row["fused_p20_us"] <= row["fused_p50_us"] <= row["fused_p80_us"]
            assert row["eager_p50_us"] > 0 and ("unfused_p50_us" in row) == (case.layer is not None)
        assert part.data["ceilings"] == {"copy_tb_per_s": 0.001, "bf16_tflop_per_s": 0.0}
        assert "share of the floor" in told[-1] and "slower than unfused in" in told[-1]
        before = json.loads(part.path.read_text())["rows"]
        assert kernels.run(*args, deadline=time.monotonic() + 600, say=told.append) == 0
        assert part.rows == before

    @pytest.mark.parametrize("primitive", [*cases.CONVOLUTIONS, *cases.PASSES, *cases.POOLS])
    def test_a_wrong_result_is_not_timed(self, tmp_path, timer, monkeypatch, primitive):
        case = next(
            c for c in cases.cases([TINY]) if c.primitive == primitive and not (c.layer and c.layer.image)
        )
        right = getattr(primitives, primitive)

        def wrong(*args):
            result = right(*args)
            first = result if isinstance(result, torch.Tensor) else result[0]
            first[..., 0] += 1.0
            return result

        monkeypatch.setattr(primitives, primitive, wrong)
        part = results.Part("kernels", MACHINE, tmp_path)
        deadline = time.monotonic() + 60
        assert kernels.run(part, [case], "cpu", timer, CEILINGS, deadline, say=lambda line: None) == 1
        assert "error" in part.rows[0] and "fused_p50_us" not in part.rows[0]


class TestBackends:
    def test_one_row_for_each(self, monkeypatch):
        monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
        assert kernels.backends("cuda") == ("triton", "cuda") and kernels.backends("cpu") == ("auto",)
        monkeypatch.setattr(dispatch, "unavailable", lambda name: "no" if name == "cuda" else None)
        assert kernels.backends("cuda") == ("triton",)
        case = cases.cases([TINY])[0]
        assert kernels.row_name(case, "cuda") == f"{case.name} cuda"
        assert kernels.row_name(case, "triton") == kernels.row_name(case, "auto") == case.name

    def test_summary(self, tmp_path):
        part = results.Part("kernels", MACHINE, tmp_path)
        row = {"primitive": "preact_conv_wgrad", "fused_p50_us": 2.0, "unfused_p50_us": 1.0, "share": 0.5}
        part.add({"name": "a", "backend": "triton", **row})
        part.add({"name": "a cuda", "backend": "cuda", **row, "fused_p50_us": 0.5, "share": 0.9})
        part.add({"name": "b cuda", "backend": "unfused", "primitive": "preact_conv_wgrad", "declined": True})
        part.add({"name": "c", "primitive": "preact_conv_wgrad", "error": "wrong"})
        triton, cuda = kernels.summary(part).splitlines()
        assert "triton" in triton and "median 0.50, slower than unfused in 1" in triton
        assert "cuda" in cuda and "median 0.90, slower than unfused in 0" in cuda


class TestSanitizer:
    @pytest.mark.parametrize(
        ("log", "errors"),
        [
            ("========= ERROR SUMMARY: 0 errors", 0),
            ("========= ERROR SUMMARY: 3 errors\n========= ERROR SUMMARY: 1 error", 4),
            ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 2),
            ("killed", None),
        ],
    )
    def test_errors(self, log, errors):
        assert sanitizer.errors_in(log) == errors

    def test_skipped_where_it_cannot_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dispatch, "unavailable", lambda name: "not built")
        part, told = results.Part("sanitizer", MACHINE, tmp_path), []
        assert sanitizer.run(part, time.monotonic() + 10, told.append) == 0
        assert part.complete and told == ["sanitizer: skipped: not built"]

    #: In front of a real run of pytest: prints what the tool prints.
    STAND_IN = "#!/bin/sh\necho '========= ERROR SUMMARY: {} errors'\n{}\nshift 4\nexec \"$@\"\n"
    SWEEPS = {"sweep 1": "one", "sweep 2": "two"}
    NAMES = [" ".join(pair) for pair in itertools.product(sanitizer.TOOLS, SWEEPS)]

    @pytest.fixture
    def stand_in(self, tmp_path, monkeypatch):
        def write(errors, before=""):
            program = tmp_path / "compute-sanitizer"
            program.write_text(self.STAND_IN.format(errors, before))
            program.chmod(0o755)
            monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
            monkeypatch.setattr(sanitizer, "find", lambda: str(program))

        return write

    @pytest.mark.parametrize(("found", "wrong"), [(0, 0), (2, 6)])
    def test_runs_every_tool(self, tmp_path, stand_in, found, wrong):
        # memcheck sees single tensors only where PyTorch does not cut them out of larger blocks.
        stand_in(found, 'test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 3')
        part, told = results.Part("sanitizer", MACHINE, tmp_path), []
        tests = tmp_path / "test_two.py"
        tests.write_text("def test_one(): pass\ndef test_two(): pass\n")
        args = (part, time.monotonic() + 200, told.append, (str(tests),), self.SWEEPS)
        assert sanitizer.run(*args) == wrong
        assert part.complete and [row["name"] for row in part.rows] == self.NAMES, told
        assert all(row["errors"] == found and row["tests_status"] == 0 for row in part.rows), part.rows

    def test_goes_on_where_it_was_cut_off(self, tmp_path, stand_in):
        part, told = results.Part("sanitizer", MACHINE, tmp_path), []
        part.add({"name": self.NAMES[0], "errors": 0, "tests_status": 0})
        # A tool that starts a process of its own, as compute-sanitizer does: neither outlives the deadline.
        stand_in(0, f"sh -c 'sleep 61.75; touch {tmp_path}/late' & wait")
        begin = time.monotonic()
        assert sanitizer.run(part, begin + 1, told.append, (), self.SWEEPS) == 0
        assert time.monotonic() - begin < 30 and not part.complete and len(part.rows) == 1
        assert told == [f"sanitizer: out of time for {self.NAMES[1]}; run it again to go on"]


class TestOnDevice:
    def test_operators_by_way_of_a_device(self, cpu_library):
        """With the CPU's operators as stand-ins: tensors out and in, in-place ones too, controls skipped."""
        library = OnDevice(torch.ops.resnet_fused_cpu, "cpu")
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        stats = library.channel_stats(x)
        assert torch.equal(stats, torch.ops.resnet_fused_cpu.channel_stats(x))
        mean, var = torch.zeros(3), torch.ones(3)
        library.update_running_stats(mean, var, stats, 40, 1.0)
        assert torch.allclose(mean, stats[0])
        library.set_schedule(1, True), library.set_multiprocessors(3)  # the hardware's own
        assert library.uses_halo(2, 16, 16, 1, True) and not library.uses_halo(1, 4, 4, 1, True)
        with pytest.raises(pytest.skip.Exception, match="launches is a control of the emulator"):
            library.launches()


@pytest.mark.usefixtures("one_thread")
class TestSteps:
    def test_contenders_on_the_cpu(self):
        rows = [steps.measure(TINY, c, "cpu", rounds=2) for c in ("bare_convolutions", "eager", "fused")]
        steps.with_overhead(rows)
        assert "overhead" not in rows[0] and rows[0]["p50_ms"] > 0
        for row in rows[1:]:
            assert row["overhead"] == pytest.approx(row["p50_ms"] / rows[0]["p50_ms"], abs=1e-3)
            assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"], rel=0.01)
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["first_step_s"] > 0
        whole, kinds = rows[2]["units_by_one_call"].split(" of ")
        assert whole == kinds and int(kinds) > 0 and "units_by_one_call" not in rows[1]

    def test_a_wrong_net_is_not_timed(self, monkeypatch):
        right = primitives.finalize_forward
        shiftless = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(4, 1)
        monkeypatch.setattr(primitives, "finalize_forward", lambda *args: right(*args) * shiftless)
        # Under record_dispatch Python calls the primitives one by one.
        with rf.record_dispatch(), pytest.raises(AssertionError, match="losses of preact_resnet29_cifar"):
            steps.measure(TINY, "fused", "cpu", rounds=1)

    def test_goes_on(self, tmp_path):
        part, told, asked = results.Part("steps", MACHINE, tmp_path), [], []

        def in_a_process(name, seconds):
            asked.append(name)
            net, contender = name.split(" ")
            row = {"name": name, "net": net, "contender": contender}
            if contender == "compiled" and len(asked) == 5:
                return None
            if contender == "eager":
                return {**row, "error": "out of memory"}
            return {**row, "p50_ms": 2.0 if contender == "bare_convolutions" else 3.0}

        args = (part, [TINY], time.monotonic() + 60, told.append, in_a_process)
        assert steps.run(*args) == 1
        assert [name.split(" ")[1] for name in asked] == list(steps.CONTENDERS)
        assert not part.complete and "out of time for preact_resnet29_cifar compiled" in told[-1]
        assert steps.run(*args) == 1 and len(asked) == 6 and part.complete
        assert {row["contender"]: row.get("overhead") for row in part.rows} == {
            "bare_convolutions": None, "eager": None, "fused": 1.5, "fused_graph": 1.5, "compiled": 1.5,
        }  # fmt: skip
        assert steps.run(part, [TINY], time.monotonic() - 1, told.append, in_a_process) == 1
        assert len(asked) == 6

    def test_a_process_that_fails_is_a_row(self, monkeypatch):
        monkeypatch.setattr(steps.sys, "executable", "false")
        row = steps._in_a_process("preact_resnet164_cifar eager", 10)
        assert row["error"] == "exit status 1" and row["contender"] == "eager"


class TestCorrectness:
    def test_report(self, tmp_path):
        path = tmp_path / "report.xml"
        path.write_text(
            '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
            '<failure message="assert 1 == 2&#10;more">text</failure></testcase><testcase classname="a" '
            'name="d"><skipped message="no"/></testcase></testsuite></testsuites>'
        )
        assert correctness.read_report(path) == (1, 1, [{"name": "a::c", "error": ["assert 1 == 2"]}])

    def test_in_two_processes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(correctness, "shards", lambda: 2)
        part, told = results.Part("correctness", MACHINE, tmp_path), []
        tests = ("tests/test_tuning.py",)
        assert correctness.run(part, time.monotonic() + 100, told.append, tests) == 0
        (row,) = part.rows
        assert part.complete and row["passed"] > 20 and row["processes"] == 2 and not row["failures"], told

    def test_shards_are_all_tests(self):
        found = []
        for i in range(3):
            items = list(range(10))
            option = SimpleNamespace(getoption=lambda name, i=i: f"{i}/3")
            conftest.pytest_collection_modifyitems(option, items)
            found += items
        assert sorted(found) == list(range(10))
