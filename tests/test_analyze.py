"""``resnet-fused analyze``: its files, its errors, and that what is interrupted leaves none by halves."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
from cifar_files import write_binary10

from resnet_fused import cli
from resnet_fused.analysis import analyze, propagation_cases
from resnet_fused.analysis.propagation import measure_propagation
from resnet_fused.analysis.propagation_cases import (
    PAPER,
    Case,
    Comparison,
    Training,
    make_cases,
    measure_case,
)
from resnet_fused.models import ResNet, registry
from resnet_fused.training.datasets import load_dataset

SHORTCUTS = ("identity", "constant_scaling", "exclusive_gating", "shortcut_only_gating", "conv", "dropout")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    def build(**options):
        return ResNet(
            [3, 2],
            (8, 10),  # with less in front of a stride the library can crash on AVX2: README, "Limits"
            stem_channels=8,
            **{"projection": "C" if options.get("shortcut") == "conv" else "A", **options},
        )

    monkeypatch.setitem(registry._MODELS, "resnet12_cifar", (10, build, ResNet))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_binary10(tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"))


def run(data, *more):
    return cli.main(
        [
            "analyze",
            "--model",
            "resnet12_cifar",
            "--data",
            data,
            "--allow-unverified",
            "-b",
            "4",
            "--threads",
            "1",
            "--device",
            "cpu",
            *more,
        ]
    )


def failing(capsys, *arguments) -> str:
    """The one line of an error that exits with status 2."""
    capsys.readouterr()
    assert cli.main(["analyze", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("resnet-fused analyze: error: ")
    return err


def rows(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_six_shortcuts(capsys, data):
    pytest.importorskip("matplotlib")
    assert run(data, "--shortcuts", *SHORTCUTS, "--steps", "0", "2") == 0
    out = capsys.readouterr().out
    assert sorted(os.listdir("propagation")) == ["losses.csv", "propagation.png", "stages.csv", "units.csv"]
    units, stages, losses = (rows(f"propagation/{name}.csv") for name in ("units", "stages", "losses"))

    assert list(dict.fromkeys(row["case"] for row in units)) == list(SHORTCUTS)
    assert len(units) == 6 * 2 * 6 and {row["dtype"] for row in units} == {"float32"}
    assert [row["name"] for row in units[:6]] == [f"layer1.{i}" for i in range(3)] + [
        "layer2.0",
        "layer2.1",
        "head",
    ]
    assert [row["stage"] for row in units[:6]] == ["0", "0", "0", "", "1", ""]
    assert len(stages) == 6 * 2 * 2 * 2 and {row["dtype"] for row in stages} == {"float32", "float64"}
    assert {(row["case"], row["stage"], row["product"]) for row in stages if row["product"]} == {
        ("identity", "0", "1"),
        ("identity", "1", "1"),
        ("constant_scaling", "0", "0.125"),
        ("constant_scaling", "1", "0.5"),
    }
    assert len(losses) == 6 * 2 and [row["step"] for row in losses[:2]] == ["0", "1"]
    for case in SHORTCUTS:
        assert sum(line.startswith(f"{case} ") for line in out.splitlines()) == 2

    with open("propagation/propagation.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"

    # The numbers are those of the library function for this net at its initialisation.
    found = load_dataset(data, allow_unverified=True)
    case = Case("", "resnet12_cifar", None, "constant_scaling")
    model = case.build(10, 3, 0).to(memory_format=torch.channels_last).train()
    normalization = propagation_cases.Normalization(*found.statistics())
    ((images, labels),) = propagation_cases.plain_batches(
        found.test_images, found.test_labels, 4, normalization
    )
    expected = measure_propagation(model, images, labels)
    first = [row for row in units if row["case"] == "constant_scaling" and row["step"] == "0"]
    for row, unit in zip(first, expected.units, strict=True):
        assert float(row["signal_rms"]) == pytest.approx(unit.signal_rms, rel=1e-6)
        assert float(row["gradient_norm"]) == pytest.approx(unit.gradient_norm, rel=1e-5)


def test_exact_in_both_dtypes(capsys, data):
    assert (
        run(
            data,
            "--orders",
            "original",
            "full_preactivation",
            "--no-pictures",
            "--output",
            "out",
            "--steps",
            "0",
        )
        == 0
    )
    stages = rows("out/stages.csv")
    assert {(row["case"], row["exact"]) for row in stages} == {
        ("original", "no"),
        ("full_preactivation", "yes"),
    }
    assert (
        sorted(os.listdir("out")) == ["losses.csv", "stages.csv", "units.csv"]
        and rows("out/losses.csv") == []
    )
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("full_pre"))
    assert line.count("exact") == 2


def test_options_of_shortcuts_and_labels(data):
    shortcuts = ["constant_scaling:shortcut_scale=0.25,residual_scale=1", "shortcut_only_gating:gate_input=x"]
    assert (
        run(
            data,
            "--shortcuts",
            *shortcuts,
            "--orders",
            "original",
            "full_preactivation",
            "--steps",
            "0",
            "--no-pictures",
            "--dtypes",
            "float64",
        )
        == 0
    )
    stages = rows("propagation/stages.csv")
    assert list(dict.fromkeys(row["case"] for row in stages)) == [
        f"{shortcut}, {order}"
        for shortcut in (
            "constant_scaling (shortcut_scale=0.25, residual_scale=1)",
            "shortcut_only_gating (gate_input=x)",
        )
        for order in ("original", "full_preactivation")
    ]
    assert {row["dtype"] for row in stages + rows("propagation/units.csv")} == {"float64"}
    assert "0.015625" in {row["product"] for row in stages}  # 0.25 ** 3
    assert stages[0]["shortcut_options"] == "shortcut_scale=0.25 residual_scale=1.0"


def test_without_matplotlib(capsys, monkeypatch, data):
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "matplotlib", None)
        assert run(data, "--steps", "0") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "pip install matplotlib" in err and "--redraw" in err
        assert sorted(os.listdir("propagation")) == ["losses.csv", "stages.csv", "units.csv"]
        assert "pip install matplotlib" in failing(capsys, "--redraw")
    pytest.importorskip("matplotlib")
    assert cli.main(["analyze", "--redraw"]) == 0 and Path("propagation/propagation.png").exists()


def test_redraw(capsys, data):
    pytest.importorskip("matplotlib")
    assert run(data, "--steps", "0", "1") == 0
    picture = Path("propagation/propagation.png")
    before = picture.read_bytes()
    picture.unlink()
    assert cli.main(["analyze", "--redraw"]) == 0
    assert picture.read_bytes() == before
    Path("propagation/units.csv").write_text("a,b\n1,2\n")
    assert "other columns" in failing(capsys, "--redraw")
    assert "cannot read elsewhere/units.csv" in failing(capsys, "--redraw", "--output", "elsewhere")
    assert picture.read_bytes() == before


def test_interrupted(capsys, monkeypatch, data):
    calls = []

    def second_is_interrupted(case, *rest):
        calls.append(case.label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_case(case, *rest)

    monkeypatch.setattr(analyze, "measure_case", second_is_interrupted)
    assert run(data, "--shortcuts", *SHORTCUTS, "--steps", "0") == 130
    assert "stopped while measuring; nothing was written" in capsys.readouterr().err
    assert os.listdir("propagation") == [] and calls == ["identity", "constant_scaling"]


def test_interrupted_between_comparisons(capsys, monkeypatch, data):
    training = Training(steps=(0,), batch_size=4)
    one, two = (
        Comparison(name, name, make_cases(["resnet12_cifar"], None, None), training)
        for name in ("one", "two")
    )
    monkeypatch.setattr(analyze, "PAPER", (one, two))
    calls = []

    def second_is_interrupted(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_case(*arguments)

    monkeypatch.setattr(analyze, "measure_case", second_is_interrupted)
    arguments = [
        "analyze",
        "--paper",
        "--data",
        data,
        "--allow-unverified",
        "--output",
        "out",
        "--threads",
        "1",
        "--no-pictures",
    ]
    assert cli.main(arguments) == 130
    assert "one complete" in capsys.readouterr().err
    assert sorted(os.listdir("out")) == [
        "one-losses.csv",
        "one-stages.csv",
        "one-units.csv",
    ]
    assert cli.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert len(os.listdir("out")) == 6


def test_nothing_is_overwritten_unasked(capsys, data):
    os.mkdir("propagation")
    Path("propagation/units.csv").write_text("precious")
    assert run(data) == 2
    assert "propagation/units.csv exists" in capsys.readouterr().err
    assert Path("propagation/units.csv").read_text() == "precious" and os.listdir("propagation") == [
        "units.csv"
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "resnet111_cifar"], ["Unknown model", "resnet110_cifar"]),
        (
            ["--model", "densenet_bc100_12_cifar"],
            ["densenet_bc100_12_cifar cannot be analysed", "residual units"],
        ),
        (["--model", "plain20_cifar", "--shortcuts", "conv"], ["no shortcuts"]),
        (["--shortcuts", "skip"], ["unknown shortcut 'skip'", "identity"]),
        (["--shortcuts", "dropout:q=0.5"], ["no option 'q'"]),
        (["--shortcuts", "dropout:0.5"], ["dropout:NAME=VALUE"]),
        (["--orders", "postactivation"], ["postactivation", "full_preactivation"]),
        (["--steps", "-1"], ["at least 0"]),
        (["-b", "1"], ["at least 2"]),
        (["--dtypes", "bfloat16"], ["bfloat16"]),
        (["--paper", "--model", "resnet20_cifar"], ["--paper chooses the nets"]),
        (["--data", "nowhere"], ["no data at 'nowhere'"]),
        (["--device", "toaster"], ["--device toaster"]),
    ],
)
def test_errors(capsys, arguments, words):
    error = failing(capsys, *arguments)
    assert all(word in error for word in words), error
    assert os.listdir() == []


def test_too_few_images(capsys, data):
    assert run(data, "-b", "5", "--steps", "0") == 2
    assert "more than the 4 of cifar10" in capsys.readouterr().err


def test_measuring_does_not_change_the_training(data):
    """Nor do snapshots depend on which others there are."""
    found, device = load_dataset(data, allow_unverified=True), torch.device("cpu")
    case = Case("", "resnet12_cifar", None, "dropout")
    often, once = (
        measure_case(case, Training(steps, 4, dtypes=(torch.float32,)), found, device, lambda message: None)
        for steps in ((0, 1, 2, 3), (3,))
    )
    assert often.losses == once.losses and len(once.losses) == 3
    assert often.snapshots[-1] == once.snapshots[0] and [step for step, _ in often.snapshots] == [0, 1, 2, 3]


def test_divergence_is_told(capsys, data):
    assert run(data, "--steps", "0", "50", "--lr", "1e30", "--no-pictures", "--dtypes", "float32") == 0
    assert "training diverged at step" in capsys.readouterr().out
    assert {row["step"] for row in rows("propagation/units.csv")} == {"0"}
    assert len(rows("propagation/losses.csv")) < 50


def test_comparisons_of_the_paper():
    shortcuts, orders, deep = PAPER
    assert [case.shortcut for case in shortcuts.cases] == list(SHORTCUTS)
    assert {case.model for case in shortcuts.cases + orders.cases} == {"resnet110_cifar"}
    assert len({case.order for case in orders.cases}) == 5
    assert [(case.model, case.order) for case in deep.cases] == [
        ("resnet1001_cifar", "original"),
        ("resnet1001_cifar", "full_preactivation"),
    ]
    for case in (*shortcuts.cases, *orders.cases):
        propagation_cases.try_case(case)
