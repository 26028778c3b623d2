"""Recipes against the papers, settings that exclude each other, options of nets, what steps do with them."""

import copy
import csv
import math
import os
import sys

import pytest
import torch
from tiny_net import add_tiny_net
from torch.nn import functional as F

from resnet_fused import cli
from resnet_fused.training import run as runs
from resnet_fused.training import sources
from resnet_fused.training.checkpoint import load_checkpoint, save_checkpoint
from resnet_fused.training.curves import Curve, draw_curves
from resnet_fused.training.datasets import ImageDataset
from resnet_fused.training.ema import weight_average
from resnet_fused.training.errors import UserError
from resnet_fused.training.loader_speed import loader_images_per_second
from resnet_fused.training.loop import train_step
from resnet_fused.training.nets import parse_model_options, told_options
from resnet_fused.training.options import TrainOptions
from resnet_fused.training.recipes import RECIPES
from resnet_fused.training.train_arguments import parse_train
from resnet_fused.training.trainer import Run


def dataset(train: int = 20, test: int = 8) -> ImageDataset:
    """Images of 12x12: dark ones of class 0, bright ones of class 1."""
    generator = torch.Generator().manual_seed(0)
    count = train + test
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 12, 12, 3), generator=generator, dtype=torch.uint8)
    images += 100 * labels[:, None, None, None].to(torch.uint8)
    return ImageDataset("tiny", images[:train], labels[:train], images[train:], labels[train:], 2, True)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, threads):
    add_tiny_net(monkeypatch)
    monkeypatch.setattr(sources, "load_dataset", lambda data, allow_unverified: dataset())
    threads(1)


def settings(**changes):
    return {"model": "tiny", "batch_size": 8, "lr": 0.05, "threads": 1, "device": "cpu", **changes}


def run_of(images: int, **given) -> Run:
    """A run that is not trained, on as many images as the paper's data set has."""
    small = dataset()
    labels = torch.zeros(images, dtype=torch.int64)
    many = ImageDataset(
        "tiny",
        torch.zeros(images, 1, 1, 3, dtype=torch.uint8),
        labels,
        small.test_images,
        small.test_labels,
        2,
        True,
    )
    source = sources.InMemorySource(many, torch.device("cpu"))
    return Run(TrainOptions.created({"model": "tiny", **given}), source, torch.device("cpu"))


# --- recipes ---


def test_recipes_name_settings():
    known = TrainOptions().as_dict()
    for name, recipe in RECIPES.items():
        assert set(recipe.settings) <= set(known), name
        assert TrainOptions.created({"recipe": name}).as_dict() == {
            **known,
            **recipe.settings,
            "recipe": name,
        }


def test_he2016():
    """He et al. 2016, appendix: 0.1, divided by 10 at 32k and 48k, 0.01 for 400 iterations, batch 128,
    weight decay 0.0001, momentum 0.9; He et al. 2015, section 4.2: 64k iterations."""
    run = run_of(50_000, recipe="he2016")
    assert run.total_steps == 64_000 and run.steps_per_epoch == 391 and run.epochs == 164
    steps = [0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999]
    assert [run.schedule(step) for step in steps] == pytest.approx(
        [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    (group,) = run.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)
    assert len(group["params"]) == len(list(run.model.parameters()))


def test_he2016_batch64():
    """fb.resnet.torch: epoch >= 122 and 2 or epoch >= 81 and 1 or 0, epochs counted from 1; -nEpochs 200."""
    run = run_of(50_000, recipe="he2016-batch64")
    assert run.options.batch_size == 64 and run.steps_per_epoch == 782 and run.total_steps == 200 * 782
    for epoch in range(1, 201):
        expected = 0.1 * 0.1 ** (2 if epoch >= 122 else 1 if epoch >= 81 else 0)
        first = (epoch - 1) * 782
        assert run.schedule(first) == pytest.approx(expected) == run.schedule(first + 781), epoch
    assert run.optimizer.param_groups[0]["nesterov"] and run.optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_wrn():
    """Zagoruyko and Komodakis 2016: Nesterov, 0.1, 5e-4, 128, x 0.2 at 60, 120, 160 of 200 epochs."""
    run = run_of(50_000, recipe="wrn")
    assert run.total_steps == 200 * 391
    epochs = [0, 59, 60, 119, 120, 159, 160, 199]
    assert [run.schedule(391 * epoch) for epoch in epochs] == pytest.approx(
        [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    )
    assert run.schedule(60 * 391 - 1) == pytest.approx(0.1)
    group = run.optimizer.param_groups[0]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 5e-4)


def test_imagenet():
    run = run_of(512, recipe="imagenet", model="tiny")
    options = run.options
    assert (options.label_smoothing, options.ema, options.epochs, options.schedule) == (
        0.1,
        0.9999,
        90,
        "cosine",
    )
    assert run.schedule(0) == pytest.approx(0.1 / 10) and run.schedule(9) == pytest.approx(
        0.1
    )  # 2 steps an epoch
    assert run.schedule(179) < 1e-4 and run.average is not None


def test_options_beside_a_recipe_win():
    options = TrainOptions.created(
        {"recipe": "he2016", "lr": 0.2, "nesterov": True, "epochs": 3, "warmup": 1.0}
    )
    assert (options.lr, options.nesterov, options.epochs, options.iterations) == (0.2, True, 3, None)
    assert (options.warmup, options.warmup_iterations, options.milestone_iterations) == (
        1.0,
        None,
        [32_000, 48_000],
    )
    assert TrainOptions.created({"recipe": "wrn", "iterations": 10}).iterations == 10
    assert TrainOptions.created({"recipe": "wrn", "milestone_iterations": [5]}).milestones is None


def test_settings_that_exclude_each_other():
    with pytest.raises(UserError, match="--epochs and --iterations exclude each other"):
        TrainOptions.created({"epochs": 1, "iterations": 1})
    with pytest.raises(UserError, match="--milestones and --milestone-iterations exclude"):
        TrainOptions.created({"milestones": [1.0], "milestone_iterations": [1]})
    with pytest.raises(
        UserError, match=r"--accumulate 9 splits a batch into more parts than .*--batch-size 8"
    ):
        TrainOptions.created({"batch_size": 8, "accumulate": 9})
    with pytest.raises(UserError, match="unknown recipe 'he2017': expected one of he2016, "):
        TrainOptions.created({"recipe": "he2017"})


def test_recipe_list(capsys):
    assert cli.main(["train", "--recipe", "list"]) == 0
    out = capsys.readouterr().out
    for text in (
        *RECIPES,
        "--iterations 64000 --milestone-iterations 32000 48000",
        "--no-nesterov",
        "--gamma 0.2",
    ):
        assert text in out, text
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "he2017"], "unknown recipe 'he2017'"),
        (["--iterations", "0"], "--iterations: should be at least 1"),
        (["--label-smoothing", "1"], "--label-smoothing: should be at least 0 and below 1, but got 1"),
        (["--ema", "nan"], "--ema: should be at least 0 and below 1, but got nan"),
        (["--model-option", "shortcut"], "--model-option should be NAME=VALUE"),
        (["--model-option", "fused=1"], "--model-option fused is set by the command itself"),
        (["--model-option", "a=1", "--model-option", "a=2"], "--model-option a is given twice"),
        (["--model-option", "a.b.c=1"], "--model-option should be NAME=VALUE"),
        (["--model-option", "a=1", "--model-option", "a.b=2"], "--model-option a.b is given twice"),
        (["--model-option", "colour=red"], "(--model-option colour=red)"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert cli.main(["train", "--output", "nowhere", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not os.path.exists("nowhere")


def test_arguments():
    given, _ = parse_train(
        "--model-option shortcut=conv --model-option dropout=0.5 --milestones 1.5 3 --iterations 7".split()
    )
    assert given == {
        "model_options": {"shortcut": "conv", "dropout": 0.5},
        "milestones": [1.5, 3.0],
        "iterations": 7,
    }
    options = parse_model_options(["a=1", "b=-6.5", "c=True", "d=none", "e-f=x=y", "g.h=0.5", "g.i=z"])
    assert options == {"a": 1, "b": -6.5, "c": True, "d": None, "e_f": "x=y", "g": {"h": 0.5, "i": "z"}}
    assert parse_model_options(told_options(options)) == options


def test_model_options_reach_the_net_and_the_checkpoint(tmp_path):
    options = {"unit_options": {"eps": 0.125}}
    run = runs.train(settings(epochs=1, model_options=options), output=str(tmp_path / "run"))
    assert run.model.bn.eps == 0.125
    assert load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["model"]["options"] == options
    assert runs.train({"epochs": 2}, resume=str(tmp_path / "run")).model.bn.eps == 0.125
    with pytest.raises(UserError, match="--model-options .* differs from the"):
        runs.train({"epochs": 3, "model_options": {}}, resume=str(tmp_path / "run"))


# --- a step ---


def small_net(norm: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)] if norm else [torch.nn.Conv2d(3, 4, 3)]
    return torch.nn.Sequential(
        *layers, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 3)
    ).double()


@pytest.mark.parametrize("images, parts", [(8, 2), (7, 3), (2, 4)])
def test_accumulated_gradients_are_those_of_the_whole_batch(images, parts):
    whole, split = small_net(norm=False), small_net(norm=False)
    x, labels = torch.randn(images, 3, 6, 6, dtype=torch.double), torch.arange(images) % 3
    results = [
        train_step(
            net, torch.optim.SGD(net.parameters()), x, labels, lr=0.1, label_smoothing=0.1, accumulate=count
        )
        for net, count in ((whole, 1), (split, parts))
    ]
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-12, atol=0)
    torch.testing.assert_close(*(logits for _, logits in results), rtol=1e-12, atol=1e-14)
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_accumulated_parts_have_their_own_batch_statistics():
    """As He et al.'s two GPUs with 64 images each: the gradient is the mean of those of the parts alone."""
    net, twin = small_net(norm=True), small_net(norm=True)
    x, labels = torch.randn(8, 3, 6, 6, dtype=torch.double), torch.arange(8) % 3
    train_step(net, torch.optim.SGD(net.parameters()), x, labels, lr=0.0, accumulate=2)
    (
        0.5 * sum(F.cross_entropy(twin(x[part]), labels[part]) for part in (slice(0, 4), slice(4, 8)))
    ).backward()
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)
    assert net[1].num_batches_tracked == 2
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)


def test_label_smoothing_is_the_formula():
    net = small_net(norm=False)
    x, labels = torch.randn(6, 3, 6, 6, dtype=torch.double), torch.arange(6) % 3
    targets = 0.9 * F.one_hot(labels, 3).double() + 0.1 / 3
    expected = -(targets * torch.log_softmax(net(x), 1)).sum(1).mean()
    loss, _ = train_step(net, torch.optim.SGD(net.parameters()), x, labels, lr=0.1, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)


def test_average_is_the_formula(tmp_path):
    """a_1 = w_1, a_n = d a_(n-1) + (1 - d) w_n, of parameters and of running statistics."""
    decay, net = 0.75, small_net(norm=True)
    average = weight_average(net, decay)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    expected = None
    for _ in range(4):
        train_step(net, optimizer, torch.randn(6, 3, 6, 6, dtype=torch.double), torch.arange(6) % 3, lr=0.1)
        average.update_parameters(net)
        now = {name: value.detach().double() for name, value in copy.deepcopy(net).state_dict().items()}
        if expected is None:
            expected = now
        else:
            expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)


def test_average_is_tested_kept_and_evaluated(tmp_path, capsys):
    run = runs.train(settings(epochs=3, ema=0.5), output=str(tmp_path / "run"))
    assert run.best_accuracy == max(row["ema_test_accuracy"] for row in run.history)
    assert run.history[-1]["ema_test_loss"] != run.history[-1]["test_loss"]
    for more, column in ([], "ema_test_loss"), (["--no-ema"], "test_loss"):
        capsys.readouterr()
        arguments = ["eval", "--checkpoint", str(tmp_path / "run"), "--device", "cpu", *more]
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert f"loss {run.history[-1][column]:.4f}" in out and ("averaged weights" in out) == (not more)
    runs.train(settings(epochs=1), output=str(tmp_path / "other"))
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "other"), "--ema", "--device", "cpu"]) == 2
    assert "has no averaged weights: it was trained without --ema" in capsys.readouterr().err


# --- runs told in iterations, and continued ---


class Killed(Exception):
    pass


def kill_after(monkeypatch, checkpoints: int):
    """The process dies right after writing its checkpoint number ``checkpoints``."""
    save, written = runs._save, []

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        written.append(1)
        if len(written) == checkpoints:
            raise Killed

    monkeypatch.setattr(runs, "_save", save_and_die)


EXACT = (
    "epoch",
    "iteration",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "ema_test_loss",
)


def assert_same(one: Run, other: Run):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    if one.average is not None:
        for name, value in one.average.state_dict().items():
            assert torch.equal(value, other.average.state_dict()[name]), name
    assert one.step == other.step and one.steps == other.steps
    for row, twin in zip(one.history, other.history, strict=True):
        assert all(row[column] == twin[column] for column in EXACT), (row, twin)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("killed", [1, 2, 3, 4])
def test_resumed_in_the_middle_of_an_epoch(tmp_path, monkeypatch, killed, fused):
    """3 steps an epoch, 8 in all, a checkpoint every 2: at 2, 3 (epoch), 4, 6 (both), 8."""
    given = settings(
        iterations=8, accumulate=2, ema=0.9, fused=fused, milestone_iterations=[4, 6], warmup_iterations=1,
        warmup_lr=0.01, label_smoothing=0.1, log_every=1,
    )  # fmt: skip
    whole = runs.train(given, output=str(tmp_path / "whole"))
    assert [row["iteration"] for row in whole.history] == [3, 6, 8] and whole.epochs == 3
    lrs = [lr for _, lr, _ in whole.steps]
    assert lrs == pytest.approx([0.01, 0.05, 0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])

    output = str(tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_after(patch, killed)
        with pytest.raises(Killed):
            runs.train({**given, "checkpoint_every": 2}, output=output)
    assert load_checkpoint(f"{output}/checkpoint.pt")["step"] == (2, 3, 4, 6)[killed - 1]
    torch.manual_seed(999)
    assert_same(whole, runs.train({}, resume=output))
    rows = list(csv.reader(open(f"{output}/steps.csv")))
    assert rows[0] == ["iteration", "lr", "train_loss"] and [int(row[0]) for row in rows[1:]] == list(
        range(1, 9)
    )
    assert math.isclose(
        sum(float(row[2]) for row in rows[1:3]) / 2, whole.history[0]["train_loss"], rel_tol=0.5
    )


def test_longer_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    given = settings(schedule="constant", fused=False)
    whole = runs.train({**given, "iterations": 6}, output=str(tmp_path / "whole"))
    runs.train({**given, "iterations": 4}, output=str(tmp_path / "run"))
    longer = runs.train({"epochs": 2}, resume=str(tmp_path / "run"))
    assert longer.step == 6 and [row["iteration"] for row in longer.history] == [3, 4, 6]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, longer.model.state_dict()[name]), name


def test_checkpoint_of_the_version_before(tmp_path, capsys):
    """What that version wrote: no step, no sums, no average, fewer settings and columns."""
    whole = runs.train(settings(epochs=2, fused=False), output=str(tmp_path / "whole"))
    runs.train(settings(epochs=1, fused=False), output=str(tmp_path / "run"))
    path = str(tmp_path / "run" / "checkpoint.pt")
    state = load_checkpoint(path)
    old = ("model data epochs batch_size lr weight_decay momentum nesterov schedule warmup amp channels_last "
           "seed fused threads device allow_unverified")  # fmt: skip
    state["options"] = {name: state["options"][name] for name in old.split()}
    state["history"] = [dict(list(row.items())[:8]) for row in state["history"]]
    for name in ("step", "sums", "steps", "average"):
        del state[name]
    state["options"]["epochs"] = 2  # the schedule follows from the length
    save_checkpoint(path, state)
    assert cli.main(["eval", "--checkpoint", path, "--device", "cpu"]) == 0
    assert "8 test images" in capsys.readouterr().out
    with pytest.raises(UserError, match="--accumulate 2 differs from the 1 of the run"):
        runs.train({"accumulate": 2}, resume=path)
    resumed = runs.train({}, resume=path)
    assert resumed.step == 6 and len(resumed.history) == 2
    # its first epoch was trained with the schedule of a run of one epoch
    assert resumed.history[1]["lr"] == whole.history[1]["lr"]
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[1].endswith(",,,,,")


# --- logs and pictures ---


def test_loader_speed_counts_the_steady_state():
    def batches(count, size):
        for _ in range(count):
            yield torch.zeros(size, 3, 2, 2), torch.zeros(size)

    cpu = torch.device("cpu")
    assert loader_images_per_second(batches(50, 4), cpu) > 0
    assert loader_images_per_second(batches(1, 4), cpu) > 0  # nothing but a first batch
    assert loader_images_per_second(batches(3, 4), cpu, in_flight=5) > 0
    stopped = batches(10**9, 4)
    assert loader_images_per_second(stopped, cpu, seconds=0.01) > 0


def test_log_tells_how_long_batches_took(tmp_path):
    run = runs.train(settings(epochs=1), output=str(tmp_path / "run"))
    (row,) = csv.DictReader(open(tmp_path / "run" / "log.csv"))
    assert (
        0 < float(row["data_seconds"]) < float(row["seconds"]) and float(row["loader_images_per_second"]) > 0
    )
    assert row["iteration"] == "3" and row["ema_test_loss"] == "" and run.steps == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs.train(settings(epochs=2, tensorboard=True, log_every=2), output=str(tmp_path / "run"))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    losses = board.Scalars("test/loss")
    assert [event.step for event in losses] == [3, 6]
    assert [event.value for event in losses] == pytest.approx([row["test_loss"] for row in run.history])
    assert [event.step for event in board.Scalars("step/train_loss")] == [2, 4, 6]


def test_missing_packages_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match="--tensorboard needs the package tensorboard .*pip install tensorboard"
    ):
        runs.train(settings(epochs=1, tensorboard=True), output=str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["train", "--curves", "--output", str(tmp_path / "run")]) == 2
    assert "--curves needs the package matplotlib" in capsys.readouterr().err
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "val").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match="a directory of images needs the package torchvision"):
        sources.open_source(str(tmp_path / "images"), torch.device("cpu"))


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    rows = [
        {
            "epoch": e,
            "iteration": 10 * e,
            "train_loss": 1 / e,
            "test_accuracy": 1 - 0.5 / e,
            "ema_test_accuracy": 0.5,
        }
        for e in (1, 2, 3)
    ]
    old = [{name: value for name, value in row.items() if name != "iteration"} for row in rows]
    for number, curves in enumerate(
        ([Curve("a", rows)], [Curve("a", rows[:1]), Curve("b", old, "red", True)], [])
    ):
        path = tmp_path / f"{number}.png"
        if curves:
            draw_curves(str(path), curves, "title", reference=6.61)
            assert image.open(path).size == (1440, 540)
    many = [Curve(f"{number}", rows, steps=[[1, 0.1, 2.0], [2, 0.1, 1.5]]) for number in range(9)]
    draw_curves(str(tmp_path / "many.png"), many, "title")
    assert image.open(tmp_path / "many.png").size == (1920, 540)
    with pytest.raises(UserError, match="cannot write .*missing"):
        draw_curves(str(tmp_path / "missing" / "a.png"), [Curve("a", rows)], "title")
