"""``resnet-fused reproduce``: the rows against the papers, interruption, failures, the report."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
from tiny_net import add_tiny_net

from resnet_fused import cli
from resnet_fused.training import nets, trainer
from resnet_fused.training.curves import draw_curves
from resnet_fused.training.datasets import ImageDataset
from resnet_fused.training.errors import UserError
from resnet_fused.training.recipes import RECIPES
from resnet_fused.training.reproduce import command
from resnet_fused.training.reproduce import report as report_module
from resnet_fused.training.reproduce.plan import Plan
from resnet_fused.training.reproduce.tables import CIFAR10, at_depth, choose_rows


def dataset(name="cifar10", lossy=True, seed=0) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(26) % 2
    images = torch.randint(0, 128, (26, 12, 12, 3), generator=generator, dtype=torch.uint8)
    images += 100 * labels[:, None, None, None].to(torch.uint8)
    return ImageDataset(name, images[:20], labels[:20], images[20:], labels[20:], 2, True, lossy)


@pytest.fixture
def tiny(monkeypatch, tmp_path, threads):
    """Small data; all nets have 8 layers and no options, except one that this version does not know."""
    add_tiny_net(monkeypatch)
    known = nets.create_model

    def create_model(name, shortcut=None, shortcut_options=None, order=None, projection=None, **options):
        if shortcut == "dropout":
            raise ValueError(f"{name} has no option 'shortcut'")
        return known("tiny", **options)

    monkeypatch.setattr(nets, "create_model", create_model)
    monkeypatch.setattr(command, "load_dataset", lambda data, allow_unverified: dataset())
    # Batches of 8 make 3 steps an epoch.
    for recipe in RECIPES.values():
        monkeypatch.setitem(recipe.settings, "batch_size", 8)
    monkeypatch.setattr(report_module, "draw_curves", lambda *args, **kwargs: None)  # takes half a second
    monkeypatch.chdir(tmp_path)
    threads(1)


def reproduce(*arguments, output="out", data="data"):
    told = ["--output", output, *(["--data", data] if data else []), "--device", "cpu", "--threads", "1"]
    return cli.main(["reproduce", *map(str, arguments), *told])


def report(output="out"):
    return Path(output, "report.md").read_text(), list(csv.DictReader(open(f"{output}/report.csv")))


def failing(capsys, *arguments, **keywords):
    capsys.readouterr()
    assert reproduce(*arguments, **keywords) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("resnet-fused reproduce: error: ")
    return err


# --- rows ---


def test_rows_are_the_papers():
    """Copied a second time from the papers' tables: 2015 table 6, 2016 tables 1 to 4."""
    errors = {row.name: row.error for row in CIFAR10}
    assert len(errors) == len(CIFAR10)
    assert [errors[f"resnet{d}"] for d in (20, 32, 44, 56, 110, 1202)] == [8.75, 7.51, 7.17, 6.97, 6.43, 7.93]
    assert [row.error for row in CIFAR10 if row.table == "2016-table1"] == [
        *(6.61, None, None, 12.35, None, 8.70, 9.81, 12.86, 6.91, 12.22, None)
    ]
    assert [row.error for row in CIFAR10 if row.table == "2016-table2"] == [
        *(6.61, 8.17, 7.84, 6.71, 6.37),
        *(5.93, 6.50, 6.14, 5.91, 5.46),
    ]
    assert [row.error for row in CIFAR10 if row.table in ("2016-table3", "2016-table4")] == [7.61, 4.92, 4.62]
    for row in CIFAR10:
        assert (row.error is None) == (row.paper in ("fail (> 20)", "curve only")), row
        assert row.recipe == ("he2016-batch64" if row.name == "preact-1001-batch64" else "he2016")
        # [1] warms up its net of 110 layers only; [2] all.
        assert (row.settings == {"warmup_iterations": 0}) == (row.table[:4] == "2015" and "11" not in row.name
                                                              and "1202" not in row.name), row  # fmt: skip


def test_rows_name_nets_and_options():
    options = {row.name: (row.model, row.options) for row in CIFAR10}
    assert options["shortcut-original"] == options["order-original-110"] == ("resnet110_cifar", {})
    assert options["shortcut-exclusive-gating-b-6"][1] == {
        "shortcut": "exclusive_gating",
        "shortcut_options": {"gate_bias": -6.0},
    }
    assert options["shortcut-only-gating-b0"][1]["shortcut"] == "shortcut_only_gating"
    assert options["shortcut-constant-0.5-1"][1]["shortcut_options"] == {
        "shortcut_scale": 0.5,
        "residual_scale": 1.0,
    }
    assert options["order-bn-after-addition-164"] == ("resnet164_cifar", {"order": "bn_after_addition"})
    assert options["order-full-110"] == ("preact_resnet110_cifar", {"projection": "A"})
    assert options["order-full-164"] == ("preact_resnet164_cifar", {})


def test_choosing_rows():
    assert len(choose_rows(["all"])) == len(CIFAR10)
    assert [row.name for row in choose_rows(["plain2*", "2016-table4", "resnet20"])] == [
        *("resnet20", "plain20", "preact-1001-batch64")
    ]
    assert len(choose_rows(["shortcut-*"])) == 11 and len(choose_rows(["2016-table2"])) == 10
    with pytest.raises(UserError, match="no row or table is named 'resnet21': --list shows them"):
        choose_rows(["resnet20", "resnet21"])


def test_depth():
    (row,) = choose_rows(["order-full-110"])
    assert at_depth(row, 20).model == "preact_resnet20_cifar" and at_depth(row, None) is row
    assert at_depth(row, 20).error == 6.37


def test_a_shorter_run_has_the_same_schedule_in_short():
    def plan(**length):
        return Plan("cifar10", ["resnet20"], [0], ["plain"], **length)

    he, batch64 = (dict(RECIPES[name].settings) for name in ("he2016", "he2016-batch64"))
    assert plan().shortened(he) == he
    short = plan(epochs=2).shortened(he)
    assert (short["epochs"], short["milestones"], short["warmup"]) == (2, [1.0, 1.5], 2 * 400 / 64_000)
    assert "iterations" not in short and "warmup_iterations" not in short and short["warmup_lr"] == 0.01
    short = plan(iterations=6400).shortened(he)
    assert short["milestone_iterations"] == [3200, 4800] and short["warmup_iterations"] == 40
    assert plan(iterations=1000).shortened(batch64)["milestone_iterations"] == [400, 605]
    assert plan(epochs=100).shortened(batch64)["milestones"] == pytest.approx([40, 60.5])


def test_list(capsys):
    assert cli.main(["reproduce", "--list", "--rows", "2016-table4", "resnet110"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].endswith("6.43 (6.61 +- 0.16)")
    assert re.match(r"preact-1001-batch64 +2016-table4 +ResNet-1001, .*4\.62 \(4\.69 \+- 0\.20\)$", lines[2])
    assert not any(os.path.exists(name) for name in ("out", "plan.json"))


# --- runs ---


def test_another_depth_is_told_with_every_name(tiny, monkeypatch):
    """A curve of 20 layers must not stand under the name of 110, nor beside the error of 110."""
    pytest.importorskip("matplotlib")
    drawn = []

    def draw_curves(path, curves, title, **options):
        drawn.append((curves, options))

    monkeypatch.setattr(report_module, "draw_curves", draw_curves)
    assert reproduce("--rows", "order-full-110", "--depth", 20, "--epochs", 1) == 0
    curves, options = drawn[-1]
    name = "ResNet-110, full pre-activation; here preact_resnet20_cifar"
    assert {curve.label for curve in curves} == {f"{name}, plain", f"{name}, fused"}
    assert options["reference"] is None
    assert f"| order-full-110 | {name} | 6.37 |" in report()[0]


ROWS = ("--rows", "resnet20", "shortcut-conv", "--epochs", "2")


def test_report(tiny, capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def draw_at_the_end(path, curves, *args, **keywords):
        if len(curves) == 4:
            draw_curves(path, curves, *args, **keywords)

    monkeypatch.setattr(report_module, "draw_curves", draw_at_the_end)
    assert reproduce(*ROWS, "--seeds", 0, 1) == 0
    text, rows = report()
    assert (
        "    resnet-fused reproduce --table cifar10 --rows resnet20 shortcut-conv --seeds 0 1 --variants"
        in text
    )
    assert "--data DIR --output DIR" in text and os.getcwd() not in text
    assert "JPEG-encoded copies of CIFAR-10" in text and "2 epochs instead of its own length" in text
    assert "1 thread on" in text and f"PyTorch {torch.__version__}" in text and "Not complete" not in text
    assert "no warm-up, as there" in text and "seeds 0, 1, float32, channels_last" in text
    header = next(line for line in text.splitlines() if line.startswith("| row"))
    assert header == "| row | net | paper | plain | fused | epochs | training, plain | training, fused |"
    assert (
        len(rows) == 8
        and {row["epochs"] for row in rows} == {"2.0"}
        and {r["iterations"] for r in rows} == {"6"}
    )
    for name, paper in (("resnet20", "8.75"), ("shortcut-conv", "12.22")):
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2] == paper and cells[5] == "2" and all(cell.endswith(" s") for cell in cells[6:])
        for cell, variant in zip(cells[3:5], ("plain", "fused"), strict=True):
            errors = [float(row["error"]) for row in rows if row["row"] == name and row["variant"] == variant]
            mean, deviation = sum(errors) / 2, abs(errors[0] - errors[1]) / 2**0.5
            assert len(errors) == 2 and cell == f"{mean:.2f} +- {deviation:.2f} (2)"
    for table in ("2015-table6", "2016-table1"):
        assert f"(curves-{table}.png)" in text and Path("out", f"curves-{table}.png").stat().st_size > 10_000
    for row in rows:  # a run is an ordinary training
        state = Path("out", "runs", row["run"], "checkpoint.pt")
        assert cli.main(["eval", "--checkpoint", str(state), "--data", "nowhere"]) == 2
        assert state.exists() and int(row["parameters"]) > 0

    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.pt")}
    capsys.readouterr()
    assert reproduce(data=None) == 0  # nothing is left to do, so no data is needed
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.pt")} == before
    assert capsys.readouterr().out.count(": done, error ") == 8 and report()[1] == rows


def test_settings_reach_the_runs(tiny):
    settings = ("--iterations", 4, "--variants", "fused", "--log-every", 1, "--accumulate", 2)
    assert reproduce("--rows", "preact-1001-batch64", *settings) == 0
    (run,) = Path("out/runs").iterdir()
    options = torch.load(run / "checkpoint.pt", weights_only=True)["options"]
    assert (
        options["model"] == "preact_resnet1001_cifar" and options["nesterov"] and options["accumulate"] == 2
    )
    assert options["milestone_iterations"] == [2, 2] and options["iterations"] == 4 and options["fused"]
    assert len((run / "steps.csv").read_text().splitlines()) == 5
    assert report()[1][0]["epochs"] == str(4 / 3)


def test_rows_of_one_net_share_a_training(tiny):
    assert (
        reproduce("--rows", "shortcut-original", "order-original-110", "--epochs", 1, "--variants", "plain")
        == 0
    )
    assert len(os.listdir("out/runs")) == 1 and len({row["error"] for row in report()[1]}) == 1
    assert len(report()[1]) == 2


def test_interrupted_and_continued(tiny, monkeypatch, capsys):
    """Ctrl-C in the third training, in the middle of its second epoch, behind a checkpoint."""
    assert reproduce(*ROWS, output="whole") == 0
    expected = {row["run"]: row["error"] for row in report("whole")[1]}
    original, steps = trainer.train_epoch, []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", interrupted)
        capsys.readouterr()
        assert reproduce(*ROWS, "--checkpoint-every", 2) == 130
        err = capsys.readouterr().err
        assert (
            "continue with: resnet-fused reproduce --output out --data data" in err and err.count("\n") == 2
        )
    text, rows = report()
    assert "**Not complete: 2 of 4 trainings are done.**" in text and len(rows) == 2
    begun = [path for path in Path("out/runs").iterdir() if not (path / "result.json").exists()]
    assert len(begun) == 1 and torch.load(begun[0] / "checkpoint.pt", weights_only=True)["step"] == 5 - 1
    done = {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("result.json")}

    assert reproduce() == 0  # --output and --data alone
    assert {row["run"]: row["error"] for row in report()[1]} == expected
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    for name in expected:
        one, other = (
            torch.load(f"{out}/runs/{name}/checkpoint.pt", weights_only=True) for out in ("out", "whole")
        )
        assert all(torch.equal(one["state_dict"][key], value) for key, value in other["state_dict"].items())


def test_more_rows_and_seeds_later(tiny):
    assert reproduce("--rows", "resnet20", "--epochs", 1, "--variants", "plain") == 0
    assert reproduce("--rows", "plain20", "--seeds", 3) == 0
    assert [(row["row"], row["seed"]) for row in report()[1]] == [
        *(("resnet20", "0"), ("plain20", "0"), ("resnet20", "3"), ("plain20", "3"))
    ]


def test_a_failure_does_not_lose_the_others(tiny, monkeypatch, capsys):
    known = nets.create_model

    def out_of_memory(name, **options):
        net = known(name, **options)
        if options.get("shortcut") == "conv" and not options["fused"] and net.fc.weight.device.type != "meta":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore lines")
        return net

    with monkeypatch.context() as patch:
        patch.setattr(nets, "create_model", out_of_memory)
        assert reproduce(*ROWS) == 1
    assert "1 of the trainings failed; the same command tries them again" in capsys.readouterr().out
    text, rows = report()
    assert "shortcut-conv, plain, seed 0: RuntimeError: DefaultCPUAllocator: can't allocate memory\n" in text
    assert "| 1 failed |" in text and "3 of 4 trainings are done" in text
    assert sum(row["error"] != "" for row in rows) == 3 and sum(row["failure"] != "" for row in rows) == 1
    assert reproduce(*ROWS) == 0
    text, rows = report()
    assert "failed" not in text.lower() and all(row["error"] for row in rows)


def test_a_diverged_training_is_a_failure(tiny, monkeypatch):
    original = trainer.train_epoch

    def diverge(model, *args, **kwargs):
        steps = original(model, *args, **kwargs)
        args[4].loss = float("nan")
        return steps

    monkeypatch.setattr(trainer, "train_epoch", diverge)
    assert reproduce("--rows", "resnet20", "--epochs", 1, "--variants", "plain") == 1
    assert "resnet20, plain, seed 0: the loss of epoch 1 is nan: training diverged" in report()[0]


def test_errors(tiny, monkeypatch, capsys):
    assert "no row or table is named 'x'" in failing(capsys, "--rows", "x")
    assert "--rows is needed" in failing(capsys)
    assert "--epochs and --iterations exclude" in failing(capsys, "--epochs", 1, "--iterations", 1)
    assert "invalid choice: 'cifar100'" in failing(capsys, "--table", "cifar100")
    error = failing(capsys, "--rows", "resnet20", "shortcut-dropout")
    assert "cannot build the net of row shortcut-dropout: resnet110_cifar has no option 'shortcut'" in error
    assert not os.path.exists("out")
    assert cli.main(["reproduce", "--rows", "resnet20"]) == 2
    assert "--output is needed" in capsys.readouterr().err
    assert "--data is needed" in failing(capsys, *ROWS, data=None)

    monkeypatch.setattr(command, "load_dataset", lambda data, allow_unverified: dataset("digits"))
    assert "data is digits: the tables are of cifar10" in failing(capsys, *ROWS)
    monkeypatch.setattr(command, "load_dataset", lambda data, allow_unverified: dataset())
    assert reproduce("--rows", "resnet20", "--epochs", 1, "--variants", "plain", output="one") == 0
    assert "--epochs 2 differs from the 1 of the reproduction in one" in failing(
        capsys, "--epochs", 2, output="one"
    )
    monkeypatch.setattr(command, "load_dataset", lambda data, allow_unverified: dataset(seed=1))
    assert "has other images than those" in failing(capsys, "--seeds", 1, output="one")
    result = next(Path("one/runs").rglob("result.json"))
    result.write_text("{")
    assert "remove it, and the run is finished from its checkpoint" in failing(capsys, output="one")
    Path("one/plan.json").write_text(json.dumps({"format": 9}))
    assert "is not the plan of a reproduction" in failing(capsys, output="one")
    Path("file").write_text("")
    assert "cannot write to file/out" in failing(capsys, *ROWS, output="file/out")
