"""A training run: a directory with its checkpoints and its log."""

from __future__ import annotations

import errno
import math
import os
import time
from typing import Any

from .checkpoint import load_checkpoint, save_checkpoint, second_name
from .curves import CURVES
from .datasets import ImageDataset
from .errors import UserError
from .interrupt import interrupt_later
from .loader_speed import loader_images_per_second
from .log import COLUMNS, LOG, STEPS, TensorBoard, write_logs
from .loop import Result, Sums
from .nets import build_model, load_weights, try_model
from .options import TrainOptions, default_output, use_device
from .progress import epoch_bar
from .sources import InMemorySource, open_source
from .trainer import Run

__all__ = ["BEST", "CHECKPOINT", "LOG", "PREVIOUS", "build_model", "checkpoint_in", "load_weights", "train"]

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "previous.pt", "best.pt"


def checkpoint_in(path: str) -> str:
    """``path``, or the checkpoint in it if it is the directory of a run."""
    return os.path.join(path, CHECKPOINT) if os.path.isdir(path) else path


def train(
    given: dict[str, Any],
    *,
    output: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dataset: ImageDataset | None = None,
) -> Run:
    """Train as the command line says, to the end.

    Args:
        given: fields of :class:`TrainOptions` that are given.
        output: directory of the run; None: that of ``resume``, or one named after the settings.
        resume: None, a checkpoint, the directory of a run, or "" for ``output``.
        overwrite: start again where there is a run already.
        dataset: what ``data`` names, if it has been read already.

    Returns:
        The finished run.

    Raises:
        UserError: a setting, the data, a checkpoint or the directory cannot be used. Nothing has been
            overwritten.
        KeyboardInterrupt: interrupted by the user; its message says how to continue.
    """
    state = None
    if resume is not None:
        path = checkpoint_in(resume or output or default_output(TrainOptions.created(given)))
        state = _load_run(path)
        options = TrainOptions.resumed(state["options"], given)
        home = os.path.dirname(path) or "."
        output = output or home
        if os.path.realpath(output) != os.path.realpath(home):
            _refuse_existing(output, overwrite)
    else:
        options = TrainOptions.created(given)
        output = output or default_output(options)
        _refuse_existing(output, overwrite)

    device = use_device(options.device, options.threads)
    try_model(options.model, options.model_options, options.fused)  # told before the data is read
    if dataset is not None:
        source = InMemorySource(dataset, device)
    else:
        source = open_source(
            options.data,
            device,
            allow_unverified=options.allow_unverified,
            image_size=options.image_size,
            workers=options.workers,
        )
    run = Run(options, source, device)
    run.directory = output
    if state is not None:
        run.restore(state, path)
        print(f"resuming {path} after {_progress(run, run.step)}", flush=True)
    try:
        os.makedirs(output, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {output}: {error.strerror or error}; choose another --output"
        ) from error
    board = TensorBoard(os.path.join(output, "tensorboard"), run.step) if options.tensorboard else None

    try:
        if run.step < run.total_steps:
            run.loader_speed = _report_data(run)
        while run.step < run.total_steps:
            _one_epoch(run, output)
            if board is not None:
                since = run.history[-2].get("iteration", 0) if len(run.history) > 1 else 0
                board.add(run.history[-1], [step for step in run.steps if step[0] > since])
    except KeyboardInterrupt:
        if run.saved_step == 0:
            raise KeyboardInterrupt(
                "stopped before the first epoch was done; no checkpoint was written"
            ) from None
        raise KeyboardInterrupt(
            f"stopped after {_progress(run, run.saved_step, 's')}; continue with: resnet-fused train "
            f"--resume {output}"
        ) from None
    finally:
        if board is not None:
            board.close()
    print(
        f"best test accuracy {100 * run.best_accuracy:.2f}%; {os.path.join(output, CHECKPOINT)}, "
        f"{BEST} and {LOG} written",
        flush=True,
    )
    return run


def _progress(run: Run, step: int, plural: str = "") -> str:
    """For messages: epochs, where the run is told in them and a whole number is done, else iterations."""
    if run.options.iterations is None and step % run.steps_per_epoch == 0:
        done, total, unit = step // run.steps_per_epoch, run.options.epochs, "epoch"
    else:
        done, total, unit = step, run.total_steps, "iteration"
    return f"{done} of {total} {unit}s" if plural else f"{unit} {done} of {total}"


def _report_data(run: Run) -> float:
    """Measure and print how fast batches come without a net: below the speed of training, they hold it up."""
    source, options = run.source, run.options
    speed = loader_images_per_second(
        source.train_batches(options.batch_size, options.seed, run.epoch),
        run.device,
        in_flight=source.in_flight,
    )
    print(
        f"data: {source.name}, {source.train_count} train and {source.test_count} test images; batches of "
        f"{options.batch_size} alone: {speed:.0f} images/s",
        flush=True,
    )
    return speed


def _one_epoch(run: Run, output: str) -> None:
    """Train to the end of the epoch or of the run, test, write the log and the checkpoints."""
    options, number = run.options, run.epoch + 1
    lr, end = run.schedule(run.first_of_row), run.end_of_epoch
    run.begin_row()
    with epoch_bar(f"epoch {number}/{run.epochs}", run.source.train_count, run.sums.images) as after_step:
        while run.step < end:
            pause = run.step + options.checkpoint_every - run.step % (options.checkpoint_every or 1)
            run.train_until(min(end, pause) if options.checkpoint_every else end, after_step)
            if run.step < end:
                start = time.perf_counter()
                run.sums.wait()
                _refuse_diverged(run, float(run.sums.loss) / run.sums.images, number, output)
                run.read_losses()
                _save(run, output, best=False)
                run.sums.pause(time.perf_counter() - start)
    trained = run.sums.result()
    _refuse_diverged(run, trained.loss, number, output)
    tested, averaged = run.test()
    row = _row(run, number, lr, trained, tested, averaged)
    _print_row(run, row)

    run.history.append(row)
    accuracy = (averaged or tested).accuracy
    best = accuracy > run.best_accuracy or len(run.history) == 1
    run.best_accuracy = max(run.best_accuracy, accuracy)
    run.sums = Sums()
    run.read_losses()
    _save(run, output, best=best)


def _row(
    run: Run, number: int, lr: float, trained: Result, tested: Result, averaged: Result | None
) -> dict[str, Any]:
    values = (number, lr, trained.loss, trained.accuracy, tested.loss, tested.accuracy)
    values += (trained.seconds, trained.images_per_second, run.step, trained.data_seconds, run.loader_speed)
    values += (averaged.loss, averaged.accuracy) if averaged else (None, None)
    return dict(zip(COLUMNS, values, strict=True))


def _print_row(run: Run, row: dict[str, Any]) -> None:
    number = f"epoch {row['epoch']}/{run.epochs}"
    if run.options.iterations is not None:
        number += f" (iteration {row['iteration']}/{run.total_steps})"
    averaged = row["ema_test_accuracy"]
    print(
        f"{number}  loss {row['train_loss']:.4f}  accuracy {100 * row['train_accuracy']:.2f}%  "
        f"test loss {row['test_loss']:.4f}  test accuracy {100 * row['test_accuracy']:.2f}%  "
        + (f"of the average {100 * averaged:.2f}%  " if averaged is not None else "")
        + f"{row['images_per_second']:.0f} images/s  lr {row['lr']:.4g}",
        flush=True,
    )


def _refuse_diverged(run: Run, loss: float, number: int, output: str) -> None:
    if math.isfinite(loss):
        return
    path = os.path.join(output, CHECKPOINT)
    done = _progress(run, run.saved_step).partition(" of ")[0]
    kept = f"{path} is as it was after {done}" if run.saved_step else "no checkpoint was written"
    raise UserError(
        f"the loss of epoch {number} is {loss}: training diverged ({kept}). Try a lower --lr or some --warmup"
    )


def _save(run: Run, output: str, *, best: bool) -> None:
    path, previous = os.path.join(output, CHECKPOINT), os.path.join(output, PREVIOUS)
    with interrupt_later():  # what is said of the checkpoint then is true of the files
        save_checkpoint(path, run.state(), keep_previous_as=previous if run.saved_step else None)
        if run.saved_step == 0:  # of a run that --overwrite replaces
            for name in (PREVIOUS, STEPS, CURVES):
                if os.path.exists(os.path.join(output, name)):
                    os.unlink(os.path.join(output, name))
        run.saved_step = run.step
        if best:
            second_name(path, os.path.join(output, BEST))
        write_logs(output, run.history, run.steps)


def _load_run(path: str) -> dict[str, Any]:
    state = load_checkpoint(path)
    missing = {
        "model",
        "normalization",
        "dataset",
        "options",
        "epoch",
        "best_accuracy",
        "history",
        "state_dict",
        "optimizer",
        "rng",
        "rng_cuda",
    } - set(state)
    if missing:
        raise UserError(f"{path} is no checkpoint of a training run: it lacks {', '.join(sorted(missing))}")
    return state


def _refuse_existing(output: str, overwrite: bool) -> None:
    found = [name for name in (CHECKPOINT, LOG) if os.path.exists(os.path.join(output, name))]
    if found and not overwrite:
        raise UserError(
            f"{output} holds a run already ({found[0]}): continue it with --resume {output}, replace it with "
            f"--overwrite, or choose another --output"
        )
