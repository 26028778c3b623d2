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
from resnet_fused.analysis import bare_convolutions, bench_step, measure, step_accuracy, step_memory
from resnet_fused.analysis.training_step import CONTENDERS, TrainingStep, synthetic_batch
from resnet_fused.models import create_model
from resnet_fused.training.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NET = "preact_resnet20_cifar"
SMALL = ["--models", NET, "--batch-size", "2", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # put back afterwards: the command sets the number of the process


class TestStep:
    def test_table(self, capsys, tmp_path):
        path, rows_path = tmp_path / "step.json", tmp_path / "step.csv"
        options = ["--no-memory", "--markdown", "--json", str(path), "--csv", str(rows_path)]
        assert cli.main(["bench", "step", *SMALL, *options]) == 0
        output = capsys.readouterr().out
        lines = output.splitlines()
        header = next(line for line in lines if "ms p50" in line)
        assert header.split() == "ms p50 p20 p80 speedup overhead saved MB peak MB RSS MB".split()
        assert max(map(len, output[: output.index("| net")].splitlines()[1:])) <= 100
        assert "| net, dtype |" in output and "| preact_resnet20, bf16 |" in output
        for title in ("eager NCHW", "eager channels_last", "fused", "bare convolutions"):
            rows = [line[22:].split() for line in lines if line.startswith(f"{title:22} ")]
            assert len(rows) == 2, "one for each dtype"
            for row in rows:
                ms, p20, p80, speedup, overhead = map(float, row[:5])
                assert ms > 0 and p20 <= ms <= p80 and speedup > 0 and overhead > 0
                assert row[5:] == ["-", "-", "-"]
        found = json.loads(path.read_text())
        assert [(cell["model"], cell["dtype"]) for cell in found["cells"]] == [(NET, "fp32"), (NET, "bf16")]
        for cell in found["cells"]:
            overhead = {row["contender"]: row["overhead"] for row in cell["contenders"]}
            assert overhead.pop("bare_convolutions") == 1 and all(value > 0 for value in overhead.values())
            assert cell["accuracy"]["failed"] == 0
            assert sum(conv["count"] for conv in cell["convolutions"]) == 21
        rows = list(csv.DictReader(rows_path.open()))
        assert len(rows) == 8 and all(float(row["overhead"]) > 0 and row["cpu"] for row in rows)
        assert {"cpu", "cores", "threads", "simd", "torch", "version", "date"} <= set(found["environment"])

    @pytest.mark.parametrize("wrong", ["forward", "backward", "nan"])
    def test_wrong_numbers_are_not_timed(self, monkeypatch, capsys, wrong):
        right = F.residual_unit

        def residual_unit(*args, **kwargs):
            result = right(*args, **kwargs)
            y, *stats = result if isinstance(result, tuple) else (result,)
            if wrong == "backward":
                y.register_hook(lambda gradient: gradient * 1.2)
            else:
                y = y * (math.nan if wrong == "nan" else 1.0001)
            return (y, *stats) if stats else y

        def interleave(*args):
            raise AssertionError("timed")

        monkeypatch.setattr(F, "residual_unit", residual_unit)
        monkeypatch.setattr(bench_step, "interleave", interleave)
        assert bench_step.main([*SMALL, "--dtypes", "fp32", "--no-memory"]) == 1
        captured = capsys.readouterr()
        assert "WRONG" in captured.err and "not timed" in captured.err and "ms p50" not in captured.out

    @pytest.mark.parametrize("options, words", [
        (["--models", "preact_resnet21_cifar"], ["preact_resnet21_cifar", "preact_resnet20_cifar"]),
        (["--dtypes", "fp8"], ["fp8"]),
        (["--rounds", "0"], ["--rounds"]),
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
            return TrainingStep(CONTENDERS[1], NET, *synthetic_batch(2), autocast=False)

        own = []
        with step_accuracy._EveryRelu(lambda index, z: own.append(z.detach()) or torch.relu(z)):
            step().losses()
        assert len(own) == 19  # two in each of nine units, and the last one
        assert max(step_accuracy.signs_in_doubt(step(), own).values()) == 0
        doubtful = step_accuracy.signs_in_doubt(step(), [z + 1e-3 for z in own])
        assert doubtful["losses"] == 0 and doubtful["gradient of conv1.weight"] > 0


class TestBareConvolutions:
    def test_all_are_found(self):
        net, images = create_model(NET, fused=False), synthetic_batch(2)[0]
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


class TestMemory:
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_activations_take_0_6_of_the_plain_nets(self, dtype):
        keys = [contender.key for contender in CONTENDERS]
        found = step_memory._worker("tensors", NET, dtype, keys, 8, 1, RESNET_FUSED_CPU_POOL_MB="0")
        for nchw, channels_last, fused in zip(*(found[key] for key in keys), strict=True):  # saved, then peak
            assert 0 < fused <= 0.6 * min(nchw, channels_last)
        assert all(saved <= peak for saved, peak in found.values())

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
    def test_resident(self):
        found = step_memory._worker("resident", NET, "fp32", ["fused"], 8, 1)
        assert found["fused"] > 0

    def test_failure_is_told(self):
        with pytest.raises(UserError, match="could not be measured.*--no-memory"):
            step_memory._worker("tensors", "no_such_net", "fp32", ["fused"], 2, 1)


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
