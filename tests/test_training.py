"""Schedules, checkpoints, the loop, and that runs repeat and continue bit for bit."""

import csv
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_net import add_tiny_net

from resnet_fused.training import checkpoint as checkpoints
from resnet_fused.training import run as runs
from resnet_fused.training import sources
from resnet_fused.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from resnet_fused.training.datasets import ImageDataset
from resnet_fused.training.errors import UserError
from resnet_fused.training.interrupt import interrupt_later
from resnet_fused.training.loop import evaluate, train_step
from resnet_fused.training.memory import peak_activation_bytes, peak_allocated_bytes, saved_activation_bytes
from resnet_fused.training.schedules import make_schedule

# --- schedules ---


def test_step_schedule_is_the_papers():
    schedule = make_schedule("step", 0.1, 64_000)
    assert [schedule(step) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_cosine_and_constant_schedule():
    schedule = make_schedule("cosine", 0.2, 100)
    assert [schedule(step) for step in (0, 25, 50, 100)] == pytest.approx(
        [0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.0]
    )
    assert {make_schedule("constant", 0.3, 10)(step) for step in range(10)} == {0.3}


@pytest.mark.parametrize("name", ["step", "cosine", "constant"])
def test_warmup(name):
    schedule = make_schedule(name, 0.1, 1000, warmup_steps=4)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'linear': expected one of step, cosine, constant"):
        make_schedule("linear", 0.1, 10)


# --- checkpoints ---

CONTENT = {
    "weights": torch.arange(1000.0),
    "epoch": 3,
    "history": [{"loss": 0.5}],
    "name": "net",
    "none": None,
}


def test_checkpoint_returns_what_was_saved(tmp_path):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, CONTENT)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("weights"), CONTENT["weights"])
    assert loaded == {"format": 1, **{key: value for key, value in CONTENT.items() if key != "weights"}}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_checkpoint_is_an_ordinary_file_of_torch_save(tmp_path):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, CONTENT)
    assert torch.load(path, weights_only=True)["epoch"] == 3
    assert zipfile.ZipFile(path).comment.startswith(b"resnet_fused sha256 ")


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(str(path), {"weights": torch.arange(8.0)})
    good = path.read_bytes()
    for position in [*range(0, len(good), 37), *range(len(good) - 90, len(good))]:
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(UserError, match="damaged|no checksum"):
            load_checkpoint(str(path))


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(str(path), CONTENT)
    good = path.read_bytes()
    for length in (0, 1, 3, 100, len(good) // 2, len(good) - 64, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="not a checkpoint|truncated|damaged"):
            load_checkpoint(str(path))


class Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_hostile_checkpoint_runs_nothing(tmp_path):
    path = tmp_path / "a.pt"
    proof = tmp_path / "proof"
    torch.save({"format": 1, "state_dict": Bomb(proof)}, path)
    with pytest.raises(UserError, match="was not written by resnet-fused"):
        load_checkpoint(str(path))
    save_checkpoint(str(path), {"state_dict": Bomb(proof)})  # the attacker can compute the checksum too
    with pytest.raises(
        UserError, match=r"holds more than tensors and plain values, and was not loaded.*mkdir"
    ):
        load_checkpoint(str(path))
    assert not proof.exists()


def test_other_format_and_missing_checkpoint(tmp_path):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, {"format": 7})
    with pytest.raises(UserError, match="has the format 7, this version of resnet-fused reads 1"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="cannot read the checkpoint .*nothing.pt: No such file"):
        load_checkpoint(str(tmp_path / "nothing.pt"))


def test_previous_checkpoint_is_kept(tmp_path):
    path, previous = str(tmp_path / "a.pt"), str(tmp_path / "previous.pt")
    for epoch in range(1, 4):
        save_checkpoint(path, {"epoch": epoch}, keep_previous_as=previous)
        assert load_checkpoint(path)["epoch"] == epoch
        assert not os.path.exists(previous) or load_checkpoint(previous)["epoch"] == epoch - 1
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "previous.pt"]


@pytest.mark.parametrize("function", ["fsync", "replace", "link"])
def test_killed_while_saving(tmp_path, monkeypatch, function):
    path, previous = str(tmp_path / "a.pt"), str(tmp_path / "previous.pt")
    for epoch in (1, 2):
        save_checkpoint(path, {"epoch": epoch}, keep_previous_as=previous)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, function, killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, {"epoch": 3}, keep_previous_as=previous)
    assert load_checkpoint(path)["epoch"] == 2 and load_checkpoint(previous)["epoch"] == 1
    save_checkpoint(path, {"epoch": 3}, keep_previous_as=previous)
    assert load_checkpoint(path)["epoch"] == 3 and load_checkpoint(previous)["epoch"] == 2
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "previous.pt"]


def test_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoints.os, "link", no_links)
    path, previous = str(tmp_path / "a.pt"), str(tmp_path / "previous.pt")
    for epoch in (1, 2):
        save_checkpoint(path, {"epoch": epoch}, keep_previous_as=previous)
    assert load_checkpoint(path)["epoch"] == 2 and load_checkpoint(previous)["epoch"] == 1


def test_disk_full(tmp_path):
    """The limit on the size of a file stands for a full disk: writing fails in the middle."""
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, {"epoch": 1})
    before = open(path, "rb").read()
    program = textwrap.dedent(f"""
        import resource, signal
        from resnet_fused.training.checkpoint import write_atomically
        from resnet_fused.training.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))
        try:
            write_atomically({path!r}, bytes(100_000))
        except UserError as error:
            print(error)
    """)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert f"cannot write {path}: " in out and "The file from before is kept. Make room" in out
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["a.pt"]
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(str(tmp_path / "missing" / "a.pt"), b"")


# --- steps and memory ---


def linear_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(12, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.ReLU(),
        torch.nn.Linear(5, 3),
    )


def test_train_step_is_sgd_on_the_cross_entropy():
    model, twin = linear_net(), linear_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    images, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 3
    loss, logits = train_step(model, optimizer, images, labels, lr=0.1)
    expected = torch.nn.functional.cross_entropy(twin(images), labels)
    expected.backward()
    assert torch.equal(loss, expected.detach()) and logits.shape == (8, 3) and not loss.requires_grad
    for parameter, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(parameter, other - 0.1 * other.grad)


def test_evaluate():
    model = linear_net()
    images, labels = torch.randn(10, 3, 2, 2), torch.arange(10) % 3
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate(model, [(images[:7], labels[:7]), (images[7:], labels[7:])])
    assert model.training and all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items()
    )
    logits = model.eval()(images)
    assert result.images == 10
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_saved_activation_bytes():
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32, bias=False), torch.nn.Sigmoid(), torch.nn.Linear(32, 16)
    )
    x = torch.randn(100, 64)
    # x, and the output of the sigmoid once, though two nodes save it; no parameter
    assert saved_activation_bytes(lambda: model(x).sum(), model) == 100 * 64 * 4 + 100 * 32 * 4


def test_peak_activation_bytes():
    """A linear layer and a square: at the peak y, its gradient (and 2 y beside it for a moment); of the weight's
    gradient nothing."""
    weight = torch.nn.Parameter(torch.randn(1 << 10, 1 << 10))
    x, one = torch.randn(1 << 6, 1 << 10), 1 << 8

    def step():
        torch.nn.functional.linear(x, weight).square().sum().backward()

    step()
    gradient = weight.grad.clone()
    with_gradient = peak_allocated_bytes(lambda: (setattr(weight, "grad", None), step()))
    size_of_y, size_of_gradient = 4 * (1 << 16), weight.numel() * 4
    without = peak_activation_bytes(step, [weight])
    assert 2 * size_of_y <= without <= 4 * size_of_y + one < size_of_gradient <= with_gradient
    assert torch.equal(weight.grad, gradient)


def test_peak_allocated_bytes():
    def step():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        c = torch.empty(1 << 19)
        return b, c

    assert peak_allocated_bytes(step) == 2 * 4 * (1 << 20)


# --- runs ---


def tiny_dataset(name: str = "bright or dark") -> ImageDataset:
    """20 + 8 images of 12x12: dark ones of class 0, bright ones of class 1."""
    generator = torch.Generator().manual_seed(len(name))
    labels = torch.arange(28) % 2
    images = torch.randint(0, 128, (28, 12, 12, 3), generator=generator, dtype=torch.uint8) + 100 * labels[
        :, None, None, None
    ].to(torch.uint8)
    return ImageDataset(name, images[:20], labels[:20], images[20:], labels[20:], 2, True)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A net of 8 layers, images of 12x12, and one thread, for runs that take a second."""
    add_tiny_net(monkeypatch)
    monkeypatch.setattr(sources, "load_dataset", lambda data, allow_unverified: tiny_dataset(data))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(**changes):
    return {
        "model": "tiny",
        "data": "bright or dark",
        "epochs": 3,
        "batch_size": 8,
        "lr": 0.05,
        "warmup": 0.5,
        "threads": 1,
        "device": "cpu",
        **changes,
    }


class Stop(Exception):
    pass


def stop_after(monkeypatch, epochs):
    """Make a run fail as if it were killed, right after its checkpoint of epoch number ``epochs``."""
    original = runs._one_epoch

    def one_epoch(run, output):
        original(run, output)
        if run.epoch == epochs:
            raise Stop

    monkeypatch.setattr(runs, "_one_epoch", one_epoch)


def assert_same_run(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    for index, state in one.optimizer.state_dict()["state"].items():
        assert torch.equal(
            state["momentum_buffer"], other.optimizer.state_dict()["state"][index]["momentum_buffer"]
        )
    for row, twin in zip(one.history, other.history, strict=True):
        for column in ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert row[column] == twin[column], column


@pytest.mark.parametrize(
    "changes",
    [{"fused": False}, {"fused": True}, {"fused": True, "amp": True, "channels_last": True}],
    ids=["plain", "fused", "fused-amp"],
)
def test_same_seed_and_resumed_run_are_the_same_bit_for_bit(tmp_path, monkeypatch, changes):
    given = settings(**changes)
    whole = runs.train(given, output=str(tmp_path / "whole"))
    again = runs.train(given, output=str(tmp_path / "again"))
    assert_same_run(whole, again)

    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            runs.train(given, output=str(tmp_path / "stopped"))
    torch.manual_seed(12345)  # what happened in the process in between does not matter
    resumed = runs.train({}, resume=str(tmp_path / "stopped"))
    assert resumed.epoch == 3
    assert_same_run(whole, resumed)
    logs = [list(csv.reader(open(tmp_path / name / "log.csv"))) for name in ("whole", "stopped")]
    assert [row[:6] for row in logs[0]] == [row[:6] for row in logs[1]] and len(logs[0]) == 4
    assert sorted(os.listdir(tmp_path / "stopped")) == ["best.pt", "checkpoint.pt", "log.csv", "previous.pt"]


def test_other_seed_is_another_run(tmp_path):
    one, other = (
        runs.train(settings(epochs=1, fused=False, seed=seed), output=str(tmp_path / str(seed)))
        for seed in (0, 1)
    )
    assert not torch.equal(one.model.conv1.weight, other.model.conv1.weight)


def test_resume_refuses_other_settings_and_other_data(tmp_path):
    output = str(tmp_path / "run")
    runs.train(settings(epochs=1, fused=False), output=output)
    with pytest.raises(UserError, match="--lr 0.2 differs from the 0.05 of the run to resume"):
        runs.train({"lr": 0.2}, resume=output)
    with pytest.raises(UserError, match="was trained on other data"):
        runs.train({"data": "other images"}, resume=output)
    assert runs.train({"epochs": 2, "lr": 0.05}, resume=output).epoch == 2
    with pytest.raises(UserError, match="holds a run already"):
        runs.train(settings(fused=False), resume=output, output=str(_other_run(tmp_path)))


def _other_run(tmp_path):
    (tmp_path / "other_run").mkdir()
    (tmp_path / "other_run" / "checkpoint.pt").write_bytes(b"precious")
    return tmp_path / "other_run"


def test_resume_from_the_previous_checkpoint_when_the_last_is_damaged(tmp_path):
    output = tmp_path / "run"
    whole = runs.train(settings(fused=False), output=str(output))
    damaged = bytearray((output / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (output / "checkpoint.pt").write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        runs.train({}, resume=str(output))
    assert_same_run(whole, runs.train({}, resume=str(output / "previous.pt")))


def test_diverged_run_stops_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    output = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            runs.train(settings(fused=False), output=output)
    state = load_checkpoint(f"{output}/checkpoint.pt")
    state["state_dict"]["conv1.weight"].fill_(math.nan)
    save_checkpoint(f"{output}/checkpoint.pt", state)
    before = open(f"{output}/checkpoint.pt", "rb").read()
    with pytest.raises(
        UserError, match="the loss of epoch 2 is nan: training diverged .*as it was after epoch 1"
    ):
        runs.train({}, resume=output)
    assert open(f"{output}/checkpoint.pt", "rb").read() == before


def test_interrupted_run_says_how_to_continue(tmp_path, monkeypatch):
    output = str(tmp_path / "run")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_one_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt, match="before the first epoch was done; no checkpoint"):
            runs.train(settings(fused=False), output=output)
    original, calls = runs._one_epoch, []

    def interrupted_later(run, directory):
        if calls:
            raise KeyboardInterrupt
        calls.append(original(run, directory))

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_one_epoch", interrupted_later)
        with pytest.raises(
            KeyboardInterrupt, match=f"stopped after 1 of 3 epochs; continue with: .* --resume {output}"
        ):
            runs.train(settings(fused=False), output=output)
    assert load_checkpoint(f"{output}/checkpoint.pt")["epoch"] == 1


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_tiny_net_learns(tmp_path, fused):
    run = runs.train(settings(epochs=10, schedule="cosine", fused=fused), output=str(tmp_path / "run"))
    assert (
        run.history[-1]["test_accuracy"] == 1.0
        and run.history[-1]["train_loss"] < 0.2 * run.history[0]["train_loss"]
    )


class TestInterruptLater:
    @pytest.fixture(autouse=True)
    def pythons_own_handler(self):
        """Which a test run in the background of a shell does not start with."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_waits_for_the_end(self):
        done = []
        with pytest.raises(KeyboardInterrupt):
            with interrupt_later():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # the handler has run by now
                done.append("inside")
            done.append("not reached")
        assert done == ["inside"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_nothing_to_wait_for(self):
        with interrupt_later():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_inside_comes_out(self):
        with pytest.raises(OSError, match="disk full"), interrupt_later():
            raise OSError("disk full")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_in_another_thread(self):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: interrupt_later().__enter__()).result() is None

    def test_ignored_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with interrupt_later():
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)
