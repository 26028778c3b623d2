"""Part "steps": training steps of whole nets, and their bare convolutions.

A step is forward under bf16 autocast, cross-entropy, backward, SGD with momentum; overhead = step / bare
convolutions. A contender runs in a process of its own, which can be stopped if it takes too long to compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from tolerances import assert_trusted_on_average
from torch import nn
from torch.nn import functional as F

from resnet_fused.analysis.measure import Timing
from resnet_fused.ops import whole_unit

from .correctness import ROOT
from .nets import NETS, Net, layers_of
from .results import Part

#: In the order that they are measured: what may take longest to compile comes last.
CONTENDERS = ("bare_convolutions", "eager", "fused", "fused_graph", "compiled")
_WARMUP, _ROUNDS = 4, 20


class Step:
    """A net with its optimizer and batch; a call is one training step and returns the loss."""

    def __init__(self, net: Net, fused: bool, device: str, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model: nn.Module = net.build(fused).to(device, memory_format=torch.channels_last).train()
        self.images, self.labels = net.batch_of_images(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self._run = torch.compile(self.model) if compiled else self.model

    def losses(self, autocast: bool = True):
        """The loss of every image."""
        # The cache of casts would hand a graph tensors that live outside of it.
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast, cache_enabled=False):
            return F.cross_entropy(self._run(self.images), self.labels, reduction="none")

    def __call__(self):
        loss = self.losses().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


class GraphedStep:
    """A training step as one CUDA graph."""

    def __init__(self, step: Step) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = step()

    def __call__(self):
        self._graph.replay()
        return self._loss


def verify(net: Net, device: str) -> None:
    """The fused net's losses and weight gradients by the trust rule, root mean squares over the images and
    over all weights; the oracle is the plain net in float32."""
    losses, gradients = [], []
    for fused, autocast in ((True, True), (False, True), (False, False)):
        step = Step(net, fused, device)
        found = step.losses(autocast)
        found.mean().backward()
        losses.append([found.detach().float().cpu()])
        weights = [m.weight.grad for m in step.model.modules() if isinstance(m, nn.Conv2d)]
        gradients.append([torch.cat([w.float().flatten() for w in weights]).cpu()])
        del step, found, weights
    assert_trusted_on_average(*losses, f"losses of {net.name}")
    assert_trusted_on_average(*gradients, f"weight gradients of {net.name}")


def time_step(step: Callable[[], object], device: str, rounds: int = _ROUNDS) -> Timing:
    """Time of steps that follow one another, as in training: launching is in it where it is the limit."""
    samples = []
    for i in range(_WARMUP + rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            samples.append((start, end))
        else:
            began = time.perf_counter()
            step()
            samples.append(time.perf_counter() - began)
    if device == "cuda":
        torch.cuda.synchronize()
        samples = [start.elapsed_time(end) / 1e3 for start, end in samples]
    return Timing.of(samples[_WARMUP:])


def bare_convolutions(net: Net, device: str, rounds: int = 10) -> float:
    """Seconds of all convolutions of a step alone, by the library: forward, input gradient and weight
    gradient of each, in the faster memory format, in bf16. Each is called twice in a row and the second call
    is timed, so that its operands are in the caches as far as they fit."""
    total = 0.0
    for layer, count in layers_of(net).items():
        best = float("inf")
        for memory_format in (torch.channels_last, torch.contiguous_format):
            def tensor(shape, memory_format=memory_format):
                return torch.randn(shape, device=device).bfloat16().contiguous(memory_format=memory_format)

            x, weight, dy = tensor(layer.input), tensor(layer.weight), tensor(layer.output)
            stride, padding, dilation, groups = layer.geometry
            options = (stride, padding, dilation, False, (0, 0), groups)

            def backward(*mask, x=x, weight=weight, dy=dy, options=options):
                return torch.ops.aten.convolution_backward(dy, x, weight, None, *options, mask)

            def forward(x=x, weight=weight, options=options):
                return torch.ops.aten.convolution(x, weight, None, *options)

            apart = [forward, lambda backward=backward: backward(False, True, False)]
            together = [forward, lambda backward=backward: backward(True, True, False)]
            if not layer.image:
                apart.append(lambda backward=backward: backward(True, False, False))
            ways = (apart,) if layer.image else (apart, together)
            for way in ways:
                best = min(best, sum(_second_call(operation, device, rounds) for operation in way))
        total += count * best
    return total


def _second_call(operation: Callable[[], object], device: str, rounds: int) -> float:
    samples = []
    for _ in range(rounds):
        operation()
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            operation()
            end.record()
            samples.append((start, end))
        else:
            began = time.perf_counter()
            operation()
            samples.append(time.perf_counter() - began)
    if device == "cuda":
        torch.cuda.synchronize()
        samples = [start.elapsed_time(end) / 1e3 for start, end in samples]
    return Timing.of(samples).p50


def measure(net: Net, contender: str, device: str, rounds: int = _ROUNDS) -> dict:
    """One row of a contender: ms, images/s and peak memory in MB."""
    row = {"name": f"{net.name} {contender}", "net": net.name, "batch": net.batch, "contender": contender}
    if contender == "bare_convolutions":
        return {**row, "p50_ms": round(1e3 * bare_convolutions(net, device, min(rounds, 10)), 3)}
    if contender == "fused":
        verify(net, device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = Step(net, contender.startswith("fused"), device, contender == "compiled")
    if contender == "fused_graph":
        step = GraphedStep(step)
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    row["first_step_s"] = round(time.perf_counter() - began, 2)
    timing = time_step(step, device, rounds)
    assert torch.isfinite(loss), f"{net.name} {contender}: the loss is {loss.item()}"
    for quantile in ("p20", "p50", "p80"):
        row[f"{quantile}_ms"] = round(1e3 * getattr(timing, quantile), 3)
    row["images_per_s"] = round(net.batch / timing.p50, 1)
    if contender.startswith("fused"):
        # Kinds of units (shapes and options, forward and backward apart) that are one call, of all.
        row["units_by_one_call"] = "{} of {}".format(*whole_unit.kept_operators())
    if device == "cuda":
        row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return row


def cell(name: str, device: str = "cuda") -> int:
    """What a process of its own does: measure "<net> <contender>" and print the row as JSON."""
    net, contender = name.split(" ")
    try:
        row = measure(NETS[net], contender, device)
    except (AssertionError, RuntimeError) as error:
        row = {"name": name, "net": net, "contender": contender, "error": str(error).splitlines()[0]}
    print(json.dumps(row))
    return 0


def _in_a_process(name: str, seconds: float) -> dict | None:
    """The row of a cell; None if it did not end in time."""
    command = [sys.executable, "-m", "bench.gpu", "--cell", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        told = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        net, contender = name.split(" ")
        return {"name": name, "net": net, "contender": contender, "error": told}


def with_overhead(rows: list[dict]) -> None:
    """Fill in overhead = step / bare convolutions, where both were measured."""
    measured = [row for row in rows if "p50_ms" in row]
    bare = {row["net"]: row["p50_ms"] for row in measured if row["contender"] == "bare_convolutions"}
    for row in measured:
        if row["contender"] != "bare_convolutions" and row["net"] in bare:
            row["overhead"] = round(row["p50_ms"] / bare[row["net"]], 3)


def run(
    part: Part,
    nets: list[Net],
    deadline: float,
    say: Callable[[str], None] = print,
    in_a_process: Callable[[str, float], dict | None] = _in_a_process,
) -> int:
    """Measure what the part lacks, until the deadline; returns how many rows are wrong."""
    late = []
    for contender in CONTENDERS:
        for net in nets:
            name = f"{net.name} {contender}"
            if part.has(name):
                continue
            left = deadline - time.monotonic()
            row = in_a_process(name, left) if left > 0 else None
            if row is None:
                late.append(name)
                continue
            part.rows.append(row)
            with_overhead(part.rows)
            part.write()
            say("steps: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("net", "contender")))
    if late:
        say(f"steps: out of time for {', '.join(late)}; run it again with --budget for more")
    else:
        part.finish()
    return sum("error" in row for row in part.rows)
