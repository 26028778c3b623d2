"""Directories of images, as torchvision's ImageFolder reads them, from tiny files made here."""

import os

import pytest
import torch
from tiny_net import add_tiny_net

from resnet_fused import cli
from resnet_fused.training import run as runs
from resnet_fused.training.errors import UserError
from resnet_fused.training.image_folder import ImageFolderSource, is_image_folder
from resnet_fused.training.loader_speed import loader_images_per_second

CPU = torch.device("cpu")
pytest.importorskip("torchvision", reason="directories of images are read by torchvision")
image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and bright; 6 train and 3 test images each, of different sizes, one of them grey."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("bright", "dark")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                shape = (20 + index, 24, 3) if index else (20, 24)
                pixels = torch.randint(0, 100, shape, generator=generator) + 150 * (1 - label)
                pixels = pixels.clamp(max=255).to(torch.uint8).numpy()
                image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def batches(folder, workers=0, batch_size=5, seed=0, epoch=0, first=0):
    source = ImageFolderSource(str(folder), CPU, image_size=16, workers=workers)
    return list(source.train_batches(batch_size, seed, epoch, first))


def test_batches(folder):
    assert is_image_folder(str(folder)) and not is_image_folder(str(folder / "train"))
    source = ImageFolderSource(str(folder), CPU, image_size=16, workers=0)
    assert (source.classes, source.channels, source.train_count, source.test_count) == (2, 3, 12, 6)
    found = list(source.train_batches(5, 0, 0))
    assert [len(labels) for _, labels in found] == [5, 5, 2]
    for x, labels in found:
        assert x.shape[1:] == (3, 16, 16) and x.dtype == torch.float32 and labels.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x.mean((1, 2, 3)) < 0.5, labels == 1)  # dark is class 1
    assert sorted(label for _, labels in found for label in labels.tolist()) == [0] * 6 + [1] * 6


def test_test_batches_are_the_centre_crop(folder):
    from torchvision.transforms.v2 import functional

    source = ImageFolderSource(str(folder), CPU, image_size=16, workers=0)
    x, labels = next(source.test_batches(4))
    assert labels.tolist() == [0, 0, 0, 1]
    with image.open(folder / "val" / "bright" / "1.png") as opened:
        resized = functional.resize(opened.convert("RGB"), [18], antialias=True)  # 16 * 256 / 224
    expected = functional.pil_to_tensor(functional.center_crop(resized, [16])).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.double).view(3, 1, 1) for v in
                 ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # fmt: skip
    torch.testing.assert_close(x[1].double(), (expected - mean) / std, rtol=1e-5, atol=1e-5)


def test_batches_follow_from_seed_and_epoch_not_from_workers(folder):
    one = batches(folder)
    state = torch.get_rng_state()
    for other in (batches(folder), batches(folder, workers=2)):
        for (x, labels), (y, same) in zip(one, other, strict=True):
            assert torch.equal(x, y) and torch.equal(labels, same)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one[0][0], batches(folder, epoch=1)[0][0])
    assert not torch.equal(one[0][0], batches(folder, seed=1)[0][0])
    for (x, _), (y, _) in zip(one[1:], batches(folder, first=1), strict=True):
        assert torch.equal(x, y)


def test_an_epoch_left_early_does_not_reach_into_the_next(folder):
    source = ImageFolderSource(str(folder), CPU, image_size=16, workers=1)
    expected = batches(folder, batch_size=2, epoch=1)
    next(iter(source.train_batches(2, 0, 0)))
    for (x, _), (y, _) in zip(expected, source.train_batches(2, 0, 1), strict=True):
        assert torch.equal(x, y)
    assert loader_images_per_second(source.train_batches(2, 0, 0), CPU, in_flight=source.in_flight) > 0


def test_train_resume_eval(folder, tmp_path, monkeypatch, capsys):
    add_tiny_net(monkeypatch)
    given = {"model": "tiny", "data": str(folder), "image_size": 16, "recipe": "imagenet", "batch_size": 4,
             "workers": 1, "epochs": 2, "device": "cpu", "threads": 1}  # fmt: skip
    whole = runs.train(given, output=str(tmp_path / "whole"))
    assert whole.options.ema == 0.9999 and whole.options.channels_last and len(whole.history) == 2
    del given["epochs"]  # within the warm-up the schedule is the same whatever the length
    runs.train({**given, "iterations": 4, "checkpoint_every": 1}, output=str(tmp_path / "run"))
    resumed = runs.train({"iterations": 6, "workers": 0}, resume=str(tmp_path / "run"))
    assert resumed.step == whole.step == 6
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name
    capsys.readouterr()
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "whole"), "--no-ema", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "images, 6 test images" in out and f"loss {whole.history[-1]['test_loss']:.4f}" in out


def test_errors_are_one_line(folder, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "train" / "dark" / "3.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^\S*dark/3.png cannot be read \(cannot identify image file"):
            batches(copy, workers=workers)
    (copy / "val" / "grey").mkdir()
    shutil.copy(copy / "val" / "dark" / "0.png", copy / "val" / "grey" / "0.png")
    with pytest.raises(UserError, match=r"train and val have different classes \(grey\)"):
        ImageFolderSource(str(copy), CPU)
    for name in ("dark", "bright"):
        shutil.rmtree(copy / "train" / name)
    with pytest.raises(UserError, match="no images in .*train"):
        ImageFolderSource(str(copy), CPU)
    os.makedirs(tmp_path / "half" / "train")
    assert cli.main(["train", "--data", str(tmp_path / "half")]) == 2
    err = capsys.readouterr().err
    assert "no CIFAR-10 or CIFAR-100 in" in err and "train/ and val/" in err and err.count("\n") == 1
