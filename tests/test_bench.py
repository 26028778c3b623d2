"""The benchmarks measure what they say, do not time wrong numbers, keep their names. No time is asserted."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import cli
from resnet_fused import functional as F
from resnet_fused.analysis import (
    bare_convolutions,
    bench_step,
    benchmark_net,
    first_step,
    inference_pass,
    measure,
    step_accuracy,
    step_memory,
    step_report,
)
from resnet_fused.analysis.benchmark_net import BenchmarkNet
from resnet_fused.analysis.contenders import COMPILED, CONTENDERS
from resnet_fused.analysis.training_step import TrainingStep
from resnet_fused.fusion.doubt import every_relu
from resnet_fused.models import create_model
from resnet_fused.training.errors import UserError
from tiny_net import TINY, tiny_create_model

ROOT = Path(__file__).resolve().parent.parent
NET = "preact_resnet20_cifar"
QUICK = ["--rounds", "1", "--threads", "1", "--no-memory", "--no-first-step"]
SMALL = ["--models", NET, "--batch-size", "2", *QUICK]
TWO = BenchmarkNet(NET, 32, 2)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # put back afterwards: the command sets the number of the process


@pytest.fixture
def tiny(monkeypatch):
    """A net of 8 layers that this process knows."""
    monkeypatch.setattr(benchmark_net, "create_model", tiny_create_model(create_model))
    return [TINY + "@16/2"]


def json_of(tmp_path, *options, status=0):
    path = tmp_path / "step.json"
    assert bench_step.main([*QUICK, "--json", str(path), *options]) == status
    return json.loads(path.read_text())


class TestStep:
    def test_table(self, capsys, tmp_path):
        path, rows_path = tmp_path / "step.json", tmp_path / "step.csv"
        options = ["--markdown", "--json", str(path), "--csv", str(rows_path)]
        assert cli.main(["bench", "step", *SMALL, *options]) == 0
        output = capsys.readouterr().out
        lines = output.splitlines()
        header = next(line for line in lines if "ms p50" in line)
        assert header.split() == "ms p50 p20 p80 speedup overhead first s saved MB peak MB RSS MB".split()
        assert max(map(len, output[: output.index("| net")].splitlines()[1:])) <= 110
        assert "| net, dtype |" in output and "| preact_resnet20, bf16 |" in output
        assert "batch 2, 32x32, 1 thread, 1 round" in output
        for title in ("eager NCHW", "eager channels_last", "eager ch. last images", "fused",
                      "bare convolutions"):
            rows = [line[22:].split() for line in lines if line.startswith(f"{title:22} ")]
            assert len(rows) == 2, "one for each dtype"
            for row in rows:
                ms, p20, p80, speedup, overhead = map(float, row[:5])
                assert ms > 0 and p20 <= ms <= p80 and speedup > 0 and overhead > 0
                assert row[5:] == ["-", "-", "-", "-"]
        found = json.loads(path.read_text())
        assert [(cell["model"], cell["dtype"]) for cell in found["cells"]] == [(NET, "fp32"), (NET, "bf16")]
        for cell in found["cells"]:
            overhead = {row["contender"]: row["overhead"] for row in cell["contenders"]}
            assert overhead.pop("bare_convolutions") == 1 and all(value > 0 for value in overhead.values())
            assert cell["accuracy"]["failed"] == 0
            assert sum(conv["count"] for conv in cell["convolutions"]) == 21
        rows = list(csv.DictReader(rows_path.open()))
        assert len(rows) == 10 and all(float(row["overhead"]) > 0 and row["cpu"] for row in rows)
        assert {"cpu", "cores", "threads", "simd", "torch", "version", "date"} <= set(found["environment"])

    @pytest.mark.parametrize("wrong", ["forward", "backward", "nan"])
    def test_wrong_numbers_are_not_timed(self, monkeypatch, capsys, wrong):
        right = F.residual_units

        def residual_units(*args, **kwargs):
            result = right(*args, **kwargs)
            y, *stats = result if isinstance(result, tuple) else (result,)
            if wrong == "backward":
                y.register_hook(lambda gradient: gradient * 1.2)
            else:
                y = y * (math.nan if wrong == "nan" else 1.0001)
            return (y, *stats) if stats else y

        def interleave(*args):
            raise AssertionError("timed")

        monkeypatch.setattr(F, "residual_units", residual_units)
        monkeypatch.setattr(bench_step, "interleave", interleave)
        assert bench_step.main([*SMALL, "--dtypes", "fp32"]) == 1
        captured = capsys.readouterr()
        assert "WRONG" in captured.err and "not timed" in captured.err and "ms p50" not in captured.out

    @pytest.mark.parametrize("options, words", [
        (["--models", "preact_resnet21_cifar"], ["preact_resnet21_cifar", "preact_resnet20_cifar"]),
        (["--dtypes", "fp8"], ["fp8"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--threads", "1", "0"], ["--threads"]),
        (["--models", f"{NET}/2", "a/b/c"], ["a/b/c", "NAME[@SIZE][/BATCH]"]),
        (["--models", f"{NET}@0/2"], [f"{NET}@0/2", "NAME[@SIZE][/BATCH]"]),
        (["--models", "keras:resnet50"], ["keras", "timm:NAME"]),
        (["--models", "densenet121@4/2"], ["densenet121@4/2", "cannot be measured"]),
        (["--json", "no/such/directory/step.json"], ["no/such/directory"]),
    ])  # fmt: skip
    def test_bad_options(self, capsys, options, words):
        assert bench_step.main(options) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == ""
        assert all(word in captured.err for word in words)

    def test_a_foreign_csv_is_left_alone(self, capsys, tmp_path):
        path = tmp_path / "other.csv"
        path.write_text("a,b\n1,2\n")
        assert bench_step.main([*SMALL, "--csv", str(path)]) == 2
        assert str(path) in capsys.readouterr().err and path.read_text() == "a,b\n1,2\n"

    def test_unknown_benchmark(self, capsys):
        assert cli.main(["bench", "stop"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


class TestAccuracy:
    exact = {"losses": torch.arange(4.0, dtype=torch.float64)}

    def off(self, by):
        return {"losses": self.exact["losses"] + by}

    @pytest.mark.parametrize("error, ok", [(1e-3, True), (1.9e-3, True), (2.1e-3, False), (math.nan, False)])
    def test_trust_rule(self, error, ok):
        plains = [self.off(0), self.off(1e-3)]
        result = step_accuracy.compare(self.exact, self.off(error), plains, torch.float32)
        assert result.ok is ok and result.compared == 1

    def test_doubt_counts_as_error_of_the_plain_net(self):
        arguments = self.exact, self.off(1e-2), [self.off(0)], torch.float32
        assert not step_accuracy.compare(*arguments).ok
        assert step_accuracy.compare(*arguments, {"losses": 2e-2}).ok

    def test_signs_in_doubt(self):
        def step():
            return TrainingStep(CONTENDERS[1], TWO, *TWO.batch(), autocast=False)

        own = []
        with every_relu(lambda index, z, slope: own.append(z.detach())):
            step().losses()
        assert len(own) == 19  # two in each of nine units, and the last one
        assert max(step_accuracy.signs_in_doubt(step(), own).values()) == 0
        doubtful = step_accuracy.signs_in_doubt(step(), [z + 1e-3 for z in own])
        assert doubtful["losses"] == 0 and doubtful["gradient of conv1.weight"] > 0


    @pytest.mark.parametrize("mode, quantities", [("train", 100), ("inference", 1)])
    def test_modes(self, mode, quantities):
        found = step_accuracy.verify(TWO, mode, ["fp32", "bf16"])
        assert all(accuracy.ok and accuracy.compared == quantities for accuracy in found.values())

    @pytest.mark.parametrize("mode, quantities", [("train", 100 + 81), ("inference", 2)])
    def test_the_whole_batch_is_verified(self, mode, quantities, monkeypatch):
        """In copies of the images that there is time for in float64: kernels depend on sizes."""
        monkeypatch.setattr(benchmark_net, "_VERIFY_GFLOP", 0.0)
        net = BenchmarkNet(NET, 32, 8)
        assert net.verify_batch_size == 4
        found = step_accuracy.verify(net, mode, ["fp32", "bf16"])
        assert all(accuracy.ok and accuracy.compared == quantities for accuracy in found.values())

        class Wrong(step_accuracy.TrainingStep):
            def losses(self):
                whole = super().losses()
                return whole * 1.01 if len(whole) == 8 else whole

        class WrongPass(step_accuracy.InferencePass):
            def __call__(self):
                whole = super().__call__()
                return whole * 1.01 if len(whole) == 8 else whole

        monkeypatch.setattr(step_accuracy, "TrainingStep", Wrong)
        monkeypatch.setattr(step_accuracy, "InferencePass", WrongPass)
        assert not step_accuracy.verify(net, mode, ["fp32"])["fp32"].ok

    def test_calibration_keeps_a_deep_net_finite(self):
        net = BenchmarkNet("preact_resnet164_cifar", 16, 2)
        step = inference_pass.InferencePass(CONTENDERS[0], net, *net.batch(), autocast=False)
        logits = step()
        assert logits.isfinite().all() and logits.abs().max() < 1e3 and not step.model.training


class TestNets:
    """NAME@SIZE/BATCH, and whose nets they are."""

    @pytest.mark.parametrize("text, name, size, batch", [
        ("wrn16_4_cifar", "wrn16_4_cifar", 32, 5),
        ("wrn16_4_cifar/64", "wrn16_4_cifar", 32, 64),
        ("timm:resnetv2_50@128/16", "timm:resnetv2_50", 128, 16),
        ("timm:resnetv2_50.a1h_in1k", "timm:resnetv2_50.a1h_in1k", 64, 5),
        ("preact_resnet50@128", "preact_resnet50", 128, 5),
    ])  # fmt: skip
    def test_form(self, text, name, size, batch):
        net = BenchmarkNet.parse(text, 5)
        assert net == BenchmarkNet(name, size, batch) and BenchmarkNet.parse(str(net)) == net
        assert BenchmarkNet.parse(net.label(5), 5) == net and len(net.label(5)) <= len(text)

    @pytest.mark.parametrize("text", ["", "a@", "a/", "a@x/2", "a@2/x", "a/2@3", "a@-1", "a/2/2", "@3/2"])
    def test_what_is_not_of_the_form(self, text):
        with pytest.raises(UserError, match="NAME"):
            BenchmarkNet.parse(text)

    def test_images_and_labels(self):
        images, labels = BenchmarkNet(NET, 24, 3).batch()
        assert images.shape == (3, 3, 24, 24) and labels.shape == (3,)
        assert torch.equal(BenchmarkNet(NET, 24, 3).batch()[0], images)

    def test_a_large_net_is_verified_with_fewer_images(self):
        assert TWO.verify_batch_size == 2
        assert BenchmarkNet("preact_resnet20_cifar", 32, 64).verify_batch_size == 64
        assert BenchmarkNet("preact_resnet50", 224, 64).verify_batch_size == 4

    def test_a_net_of_another_package(self, monkeypatch, tmp_path, capsys):
        def build(name):
            torch.manual_seed(0)
            return tiny_create_model(create_model)(TINY, fused=False).train()

        monkeypatch.setattr(benchmark_net, "build", build)
        found = json_of(tmp_path, "--models", "timm:tiny@16/2", "--dtypes", "fp32", "--markdown")
        assert [found["cells"][0][key] for key in ("model", "pixels", "batch_size")] == ["timm:tiny", 16, 2]
        assert "| tiny@16/2, fp32 |" in capsys.readouterr().out

    def test_nothing_to_fuse(self, monkeypatch, capsys):
        monkeypatch.setattr(benchmark_net, "build", lambda name: torch.nn.Conv2d(3, 4, 1))
        assert bench_step.main(["--models", "timm:conv"]) == 2
        assert "timm:conv has nothing to fuse" in capsys.readouterr().err


class TestModes:
    def test_inference(self, tiny, tmp_path, capsys):
        found = json_of(tmp_path, "--models", *tiny, "--inference", "--markdown")
        assert [cell["mode"] for cell in found["cells"]] == ["inference"] * 2
        for cell in found["cells"]:
            assert cell["accuracy"]["quantity"] == "logits" and cell["optimizer"] is None
            assert all(list(conv["ms"]) == ["forward"] for conv in cell["convolutions"])
        assert "forward in eval mode" in capsys.readouterr().out

    def test_wrong_logits_are_not_timed(self, tiny, monkeypatch, capsys):
        class Wrong(inference_pass.InferencePass):
            def __init__(self, contender, *args, **kwargs):
                super().__init__(contender, *args, **kwargs)
                self.fused = contender.fused

            def __call__(self):
                logits = super().__call__().clone()
                if self.fused:
                    logits[0] *= 1.0001  # one image of two
                return logits

        monkeypatch.setattr(step_accuracy, "InferencePass", Wrong)
        assert bench_step.main([*QUICK, "--models", *tiny, "--inference", "--dtypes", "fp32"]) == 1
        assert "WRONG" in capsys.readouterr().err

    def test_several_numbers_of_threads(self, tiny, monkeypatch, tmp_path, capsys):
        asked = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)  # two that spin crawl on a busy machine
        rows = tmp_path / "step.csv"
        found = json_of(tmp_path, "--models", *tiny, "--dtypes", "fp32", "--threads", "1", "2", "--markdown",
                        "--csv", str(rows))
        assert asked == [1, 2] and [cell["threads"] for cell in found["cells"]] == [1, 2]
        assert found["environment"]["threads"] == [1, 2]
        assert [row["threads"] for row in csv.DictReader(rows.open())] == ["1"] * 5 + ["2"] * 5
        output = capsys.readouterr().out
        assert output.count("| net, dtype |") == 2 and "threads: 1," in output and "threads: 2," in output


class TestCompiled:
    def test_failure_is_told_and_loses_nothing(self, tiny, monkeypatch, tmp_path, capsys):
        def compile(model):
            if next(model.parameters()).is_contiguous():
                raise RuntimeError("no compiler\nand more")
            return model

        monkeypatch.setattr(torch, "compile", compile)
        rows_path = tmp_path / "step.csv"
        found = json_of(tmp_path, "--models", *tiny, "--compile", "--dtypes", "fp32", "--markdown", "--csv",
                        str(rows_path))
        rows = {row["contender"]: row for row in found["cells"][0]["contenders"]}
        assert rows["compiled_nchw"]["failure"] == "RuntimeError: no compiler"
        assert rows["compiled_nchw"]["ms"] is None and rows["compiled_nchw"]["speedup"] is None
        assert rows["compiled_channels_last"]["ms"]["p50"] > 0 and rows["fused"]["overhead"] > 0
        best = min(rows[key]["ms"]["p50"] for key in rows if key.startswith(("eager", "compiled"))
                   and rows[key]["ms"])  # fmt: skip
        assert rows["fused"]["speedup"] == pytest.approx(best / rows["fused"]["ms"]["p50"])
        output = capsys.readouterr().out
        assert "torch.compile NCHW     failed: RuntimeError: no compiler" in output
        failures = {row["contender"]: row["failure"] for row in csv.DictReader(rows_path.open())}
        assert failures["compiled_nchw"] and not failures["fused"]

    def test_first_step_of_a_process_that_fails(self, monkeypatch):
        def json_from_process(*args, failure, **kwargs):
            raise UserError(f"{failure}: killed")

        monkeypatch.setattr(first_step, "json_from_process", json_from_process)
        arguments = 1, "", False, None
        found = first_step.measure_first_step(TWO, "train", "fp32", COMPILED[0], *arguments)
        assert found == first_step.FirstStep(failure="killed")
        with pytest.raises(UserError, match="killed"):
            first_step.measure_first_step(TWO, "train", "fp32", CONTENDERS[0], *arguments)

    def test_a_first_step_that_takes_too_long(self):
        found = first_step.measure_first_step(TWO, "train", "fp32", COMPILED[0], 1, "", False, timeout=0.01)
        assert found.seconds is None and "stopped after" in found.failure

    def test_first_step(self, tmp_path):
        fused = CONTENDERS[-1]
        found = first_step.measure_first_step(TWO, "train", "fp32", fused, 1, str(tmp_path), False, None)
        assert found.seconds > 0 and found.failure is None


class TestReport:
    def test_the_table_of_the_readme_is_not_too_wide(self):
        def row(key, ms, memory=None):
            return step_report.Row(key, key, measure.Timing(ms / 1e3, ms / 1e3, ms / 1e3), memory,
                                   1050.123 if key.startswith("compiled") else 12.3)

        memory = step_memory.StepMemory(2_123_456_789, 2_223_456_789, 2_323_456_789)
        keys = ["eager_nchw", "eager_channels_last", "fused", "compiled_nchw", "compiled_channels_last"]
        net = BenchmarkNet("preact_resnet1001_cifar", 32, 16)
        accuracy = step_accuracy.Accuracy("losses", 0.0, 0.0, 0.0, 0, 1)
        cell = step_report.Cell(net, "train", "bf16", 2, 7, accuracy,
                                [*(row(key, 2313.4 + i, memory) for i, key in enumerate(keys)),
                                 row(step_report.BARE, 1143.21)])  # fmt: skip
        environment = dict.fromkeys(["cpu", "simd", "torch", "version", "commit", "date"], "x")
        lines = step_report.markdown([cell], environment).splitlines()
        assert lines[2].startswith("| preact_resnet1001/16, bf16 | 2313 NCHW | 2316 NCHW | **2315** |")
        assert all(len(line) <= 170 for line in lines[:3]), [len(line) for line in lines[:3]]


class TestBareConvolutions:
    def test_all_are_found(self):
        net, images = create_model(NET, fused=False), TWO.batch()[0]
        found = bare_convolutions.collect_convolutions(net, images)
        assert found.total() == 21 and max(found.values()) == 6
        first = [conv for conv in found if not conv.input_gradient]
        assert [conv.input for conv in first] == [(2, 3, 32, 32)] and found[first[0]] == 1
        with FlopCounterMode(display=False) as counter:
            net(images)
        linear = 2 * 2 * 64 * 10
        assert sum(conv.flops * count for conv, count in found.items()) == counter.get_total_flops() - linear
        assert all(buffer.device.type == "cpu" for buffer in net.buffers()), "the net itself stays as it was"

    def test_fastest(self):
        geometry = (2, 2), (1, 1), (1, 1), 1
        conv = bare_convolutions.Convolution((2, 8, 6, 6), (4, 8, 3, 3), *geometry, True, True)
        assert conv.output == (2, 4, 3, 3) and str(conv) == "8->4 3x3 stride 2 on 2x6x6"
        candidate = bare_convolutions._Candidate(conv, torch.channels_last, torch.float32, torch.Generator())
        shapes = [tuple(t.shape) for t in candidate.operations["dgrad+wgrad"]() if t is not None]
        assert shapes == [conv.input, conv.weight, (4,)]
        candidate.samples = {"forward": [1.0, 1.2], "dgrad": [2.0], "wgrad": [3.0], "dgrad+wgrad": [4.5]}
        assert candidate.fastest() == ("forward", "dgrad+wgrad")
        candidate.samples["dgrad"] = [1.0]
        assert candidate.fastest() == ("forward", "dgrad", "wgrad")
        assert candidate.seconds(candidate.fastest()) == pytest.approx(5.1)

    def test_inference_is_forward_only(self):
        bare = bare_convolutions.BareConvolutions(TWO.convolutions, torch.float32, training=False)
        bare.run_round()
        assert all(list(conv["ms"]) == ["forward"] for conv in bare.details()) and bare.timing().p50 > 0


class TestMeasure:
    def test_quantiles(self):
        assert measure.Timing.of([float(i) for i in range(11)]) == measure.Timing(2.0, 5.0, 8.0)
        assert measure.Timing.of([3.0]) == measure.Timing(3.0, 3.0, 3.0)

    def test_interleave(self):
        calls, done = [], []
        contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
        samples = measure.interleave(contenders, 5, done.append)
        assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 5)
        assert done == [1, 2, 3, 4, 5]
        rounds = ["".join(calls[i : i + 3]) for i in range(0, 15, 3)]
        assert all(sorted(one) == list("abc") for one in rounds) and len(set(rounds)) > 1

    def test_lead_in(self, monkeypatch):
        """Right before the sample, and not part of it."""
        calls, now = [], [0]

        def run(name, seconds):
            calls.append(name)
            now[0] += seconds

        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
        contenders = {"a": lambda: run("a", 2), "b": lambda: run("b", 3)}
        samples = measure.interleave(contenders, 3, lead_in={"a": lambda: run("-", 100)})
        assert "".join(calls).replace("-a", "").replace("b", "") == "" and len(calls) == 9
        assert samples == {"a": [2] * 3, "b": [3] * 3}


class TestMemory:
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_activations_take_half_of_the_plain_nets(self, dtype):
        keys = [contender.key for contender in CONTENDERS]
        net = BenchmarkNet(NET, 32, 8)
        found = step_memory._worker("tensors", net, "train", dtype, keys, 1, RESNET_FUSED_CPU_POOL_MB="0")
        # Of a norm's statistics as much is saved as plain nets save: with batches of 8 a thousandth of all.
        for share, *eager, fused in zip(
            (0.501, 0.5), *(found[key] for key in keys), strict=True  # saved, then peak
        ):
            assert 0 < fused <= share * min(eager)
        assert all(saved <= peak for saved, peak in found.values())

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
    def test_resident(self):
        found = step_memory._worker("resident", BenchmarkNet(NET, 32, 8), "train", "fp32", ["fused"], 1)
        assert found["fused"] > 0

    def test_failure_is_told(self):
        with pytest.raises(UserError, match="could not be measured.*--no-memory"):
            step_memory._worker("tensors", BenchmarkNet("no_such_net", 32, 2), "train", "fp32", ["fused"], 1)

    def test_inference(self):
        found = step_memory.measure_memory(TWO, "inference", "fp32", ["eager_nchw", "fused"], 1)
        assert all(memory.saved == 0 and memory.peak > 0 for memory in found.values())


def pytest_bench(*options, seed="0"):
    # One thread: two that spin for each other crawl on a busy machine.
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--device", "cpu"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


class TestPytestBench:
    def test_ids_are_stable(self):
        outputs = (pytest_bench("--collect-only", seed=seed) for seed in "12")
        ids, again = ([line for line in output.splitlines() if "::" in line] for output in outputs)
        assert ids == again and len(ids) == len(set(ids))
        assert "bench_preact_conv_forward.py::bench_preact_conv_forward[cpu-cpu-fp32-3x3-16to16-32x32]" in ids
        assert "bench_units.py::bench_backward[cpu-eager-bf16-bottleneck-64-16-32x32]" in ids
        stems = {path.stem for path in (ROOT / "bench").glob("bench_*.py")}
        assert {line.partition(".py")[0] for line in ids} == stems

    def test_json(self, tmp_path):
        path = tmp_path / "bench.json"
        pytest_bench("-k", "finalize or (bench_preact_conv_wgrad and reference and fp32 and 1x1-256to64)",
                     f"--benchmark-json={path}")  # fmt: skip
        found = {one["name"]: one for one in json.loads(path.read_text())["benchmarks"]}
        wgrad = found["bench_preact_conv_wgrad[cpu-reference-fp32-1x1-256to64-8x8]"]["extra_info"]
        assert wgrad["flops"] == 2 * 64 * 8 * 8 * 256 * 64
        assert wgrad["bytes"] == 4 * (64 * 64 * 8 * 8 + 64 * 256 * 8 * 8 + 4 * 256 + 256 * 64)
        assert all({"backend", "device", "bytes", "cpu", "threads", "torch"} <= set(one["extra_info"])
                   for one in found.values())  # fmt: skip
