"""The command line: what it prints, and that errors are one line and exit status 2."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cifar_files import write_binary10, write_pickles10
from tiny_net import add_tiny_net

import resnet_fused
from resnet_fused import cli
from resnet_fused.training import demo
from resnet_fused.training.checkpoint import save_checkpoint

ROOT = str(Path(resnet_fused.__file__).resolve().parent.parent)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    add_tiny_net(monkeypatch)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_binary10(tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"))


def train_arguments(data, *more):
    return [
        "train",
        "--model",
        "tiny",
        "--data",
        data,
        "--allow-unverified",
        "--epochs",
        "2",
        "-b",
        "8",
        "--threads",
        "1",
        "--device",
        "cpu",
        *more,
    ]


def failing(capsys, *arguments) -> str:
    """The one line of an error that exits with status 2."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith(f"resnet-fused {arguments[0]}: error: ")
    return err


def test_train_eval_resume(capsys, data, tmp_path):
    assert (
        cli.main(
            train_arguments(
                data, "--output", "run", "--schedule", "cosine", "--warmup", "0.5", "--channels-last"
            )
        )
        == 0
    )
    out = capsys.readouterr().out
    assert re.search(
        r"epoch 2/2  loss [\d.]+  accuracy [\d.]+%  test loss [\d.]+  test accuracy [\d.]+%  \d+ images/s",
        out,
    )
    assert sorted(os.listdir("run")) == ["best.pt", "checkpoint.pt", "curves.png", "log.csv", "previous.pt"]
    assert len(Path("run/log.csv").read_text().splitlines()) == 3
    printed = float(re.findall(r"test loss ([\d.]+)", out)[-1])

    for more in ([], ["--no-fused"]):
        assert (
            cli.main(
                [
                    "eval",
                    "--checkpoint",
                    "run",
                    "--data",
                    data,
                    "--allow-unverified",
                    "--device",
                    "cpu",
                    *more,
                ]
            )
            == 0
        )
        out = capsys.readouterr().out
        assert f"tiny ({'plain' if more else 'fused'}), cifar10, 4 test images" in out
        assert float(re.search(r"loss ([\d.]+)", out)[1]) == pytest.approx(printed, abs=2e-3)

    assert cli.main(["train", "--resume", "run", "--epochs", "3"]) == 0
    assert "resuming run/checkpoint.pt after epoch 2 of 3" in capsys.readouterr().out
    assert (
        cli.main(train_arguments(data, "--output", "run", "--overwrite", "--no-fused", "--epochs", "1")) == 0
    )
    assert "previous.pt" not in os.listdir("run")


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_run_is_not_overwritten(capsys, monkeypatch, data):
    os.mkdir("run")
    Path("run/checkpoint.pt").write_bytes(b"precious")
    error = failing(capsys, *train_arguments(data, "--output", "run"))
    assert "run holds a run already" in error and "--resume run" in error and "--overwrite" in error
    assert Path("run/checkpoint.pt").read_bytes() == b"precious" and os.listdir("run") == ["checkpoint.pt"]
    # an error found later must not have thrown away what is to be overwritten
    failing(capsys, *train_arguments("missing", "--output", "run", "--overwrite"))
    monkeypatch.setattr("resnet_fused.training.trainer.train_epoch", interrupt)
    assert cli.main(train_arguments(data, "--output", "run", "--overwrite")) == 130
    assert "no checkpoint was written" in capsys.readouterr().err
    assert Path("run/checkpoint.pt").read_bytes() == b"precious"


def test_missing_data(capsys):
    assert "no data at 'nowhere': there is no such file" in failing(capsys, *train_arguments("nowhere"))
    assert os.listdir() == []


def test_unknown_model(capsys):
    error = failing(capsys, "train", "--model", "preact_resnet_20")
    assert "Unknown model 'preact_resnet_20'. Did you mean preact_resnet20_cifar" in error
    assert "Unknown model" in failing(capsys, "demo", "--model", "nothing")
    assert os.listdir() == []


def test_truncated_and_unverified_data(capsys, tmp_path):
    folder = write_pickles10(tmp_path / "cifar-10-batches-py")
    error = failing(capsys, "train", "--data", folder)
    assert "was not unpickled" in error and "--allow-unverified" in error
    batch = folder / "data_batch_4"
    batch.write_bytes(batch.read_bytes()[:1000])
    assert "data_batch_4 is damaged" in failing(capsys, "train", "--data", folder, "--allow-unverified")
    assert os.listdir() == ["cifar-10-batches-py"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read the checkpoint"),
        (b"", "is not a checkpoint"),
        (b"PK\3\4 cut off", "is truncated"),
        ("truncated", "is truncated"),
        ("flipped", "is damaged"),
        ("hostile", "was not loaded"),
        ("other", "lacks"),
        ("tensor", "has the format 'Tensor'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_checkpoint(capsys, command, content, message):
    path = Path("checkpoint.pt")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_checkpoint(str(path), {"state_dict": torch.nn.Linear(2, 2) if content == "hostile" else {}})
        data = bytearray(path.read_bytes())
        if content == "tensor":
            from resnet_fused.training import checkpoint

            original, checkpoint.torch.save = (
                checkpoint.torch.save,
                lambda _, file: original(torch.ones(3), file),
            )
            try:
                save_checkpoint(str(path), {})
            finally:
                checkpoint.torch.save = original
            data = path.read_bytes()
        if content == "flipped":
            data[100] ^= 1
        path.write_bytes(data[:-1] if content == "truncated" else data)
    error = failing(capsys, command, "--resume", "checkpoint.pt")
    assert message.replace("Tensor", "Tensor") in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--epochs", "0"], "--epochs: should be at least 1, but got 0"),
        (["train", "--lr", "-1"], "--lr: should be at least 0"),
        (["train", "--lr", "nan"], "--lr: should be at least 0, but got nan"),
        (["train", "-b", "many"], "invalid int value: 'many'"),
        (["train", "--schedule", "linear"], "invalid choice: 'linear'"),
        (["train", "--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
        (["train", "--device", "abacus"], "--device abacus cannot be used"),
        (["train", "--threads", "0"], "--threads: should be at least 1"),
        (["eval"], "the following arguments are required: --checkpoint"),
        (["eval", "--checkpoint", "x", "-b", "0"], "--batch-size"),
        (["demo", "--epochs", "1"], "--epochs: should be at least 2"),
        (["bench", "nothing"], "unknown benchmark 'nothing'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in failing(capsys, *arguments)


def test_output_that_cannot_be_written(capsys, data):
    Path("file").write_text("no directory")
    assert "cannot write to file/run" in failing(capsys, *train_arguments(data, "--output", "file/run"))


def test_help_and_unknown_command(capsys):
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in ("doctor", "demo", "train", "eval", "bench"))
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["frain"]) == 2
    assert "unknown command 'frain'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"resnet-fused {resnet_fused.__version__}\n"
    for command in cli.COMMANDS:
        try:
            assert cli.main([command, "--help"]) == 0
        except SystemExit as finished:
            assert finished.code == 0
        assert f"usage: resnet-fused {command}" in capsys.readouterr().out


def test_a_missing_library_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "--data digits needs the package scikit-learn" in failing(capsys, "train", "--data", "digits")


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "resnet_fused", *arguments],
        stdout=subprocess.PIPE,
        # A runner in the background of a shell has SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        **options,
    )


def test_interrupted(data):
    """Ctrl-C in a process of its own: a line, status 130, and the checkpoint goes on from there."""
    process = start(
        "train",
        "--model",
        "preact_resnet20_cifar",
        "--data",
        data,
        "--allow-unverified",
        "--epochs",
        "100000",
        "-b",
        "20",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--output",
        "run",
    )
    deadline = time.monotonic() + 120
    while not os.path.exists("run/checkpoint.pt") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "continue with: resnet-fused train --resume run" in err
    assert cli.main(["eval", "--checkpoint", "run", "--allow-unverified", "--device", "cpu"]) == 0


def test_module_entry_and_exit_status(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "resnet_fused.train", "--data", "nowhere"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        check=False,
    )
    assert process.returncode == 2 and process.stdout == ""
    assert (
        process.stderr.startswith("resnet-fused train: error: no data at 'nowhere'")
        and process.stderr.count("\n") == 1
    )


def test_demo(capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    # all of the demo, on a fifth of the digits and for 2 epochs instead of 12
    data = demo.load_dataset("digits")
    part = dataclasses.replace(
        data,
        train_images=data.train_images[:288],
        train_labels=data.train_labels[:288],
        test_images=data.test_images[:64],
        test_labels=data.test_labels[:64],
    )
    monkeypatch.setattr(demo, "load_dataset", lambda _: part)
    assert cli.main(["demo", "--epochs", "2", "--device", "cpu", "--threads", "1", "--output", "a.png"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if "  " in line.strip()}
    accuracy = [float(cell.rstrip("%")) for cell in rows["test accuracy"][-2:]]
    assert abs(accuracy[0] - accuracy[1]) < 15
    for name in ("ms per training step, median", "peak memory of a step, MiB"):
        plain, fused, ratio = map(float, rows[name][-3:])
        assert plain > 0 and fused > 0 and ratio == pytest.approx(fused / plain, abs=0.01 + 0.1 / plain)
    assert ratio < 0.9
    fused_difference, control_difference = map(
        float, re.findall(r": (\d\.\de[+-]\d+)\)?$", out, re.MULTILINE)
    )
    assert 0 < fused_difference < 20 * control_difference
    assert f"curves: {os.path.abspath('a.png')}" in out and Path("a.png").read_bytes().startswith(b"\x89PNG")
