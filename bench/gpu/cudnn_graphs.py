"""The peer: cuDNN's own fused training graphs, at the layers and in the dtype that it takes.

    preact_conv_forward   scale, shift, ReLU -> convolution -> sum and sum of squares per channel
    preact_conv_dgrad     input gradient -> ReLU's gradient at the recomputed BatchNorm -> BatchNorm's weight
                          gradients
    preact_conv_wgrad     scale, shift, ReLU -> weight gradient
    preact_conv_backward_1x1   the last two, one after the other

cuDNN has kernels for these patterns in float16 only, with scale and shift in float16 too where they come
before a convolution (9.26 proposes nothing for bfloat16, nor for float32 scale and shift); BatchNorm's weight
gradients take mean, 1/std, gamma and beta in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tolerances import assert_trusted
from torch import Tensor

from . import cudnn_backend as cudnn
from .cases import Prepared
from .cudnn_backend import CudnnError, Graph, Spec
from .nets import Layer
from .timing import Timer

#: Gives a graph's plans, and why there are not more, as :func:`cudnn_backend.plans` does.
Planner = Callable[[Graph], tuple[list, list[str]]]


def _normalized(graph: Graph, x: Spec, dtype: torch.dtype) -> Spec:
    scale, shift = (graph.row(x.shape[1], name, dtype) for name in ("scale", "shift"))
    return graph.pointwise("relu", graph.pointwise("add", graph.pointwise("mul", x, scale), shift))


def forward(layer: Layer, dtype: torch.dtype) -> Graph:
    graph, channels = Graph(), layer.output[1]
    x, weight = graph.tensor(layer.input, "x", dtype), graph.tensor(layer.weight, "weight", dtype)
    y = graph.tensor(layer.output, "y", dtype)
    graph.convolution(_normalized(graph, x, dtype), weight, y, layer.stride, layer.padding)
    graph.channel_sums(y, graph.row(channels, "sum"), graph.row(channels, "squares"))
    return graph


def dgrad(layer: Layer, dtype: torch.dtype) -> Graph:
    graph, channels = Graph(), layer.input[1]
    dy, weight = graph.tensor(layer.output, "dy", dtype), graph.tensor(layer.weight, "weight", dtype)
    x, da = graph.tensor(layer.input, "x", dtype), graph.tensor(layer.input)
    mean, invstd, gamma, beta = (graph.row(channels, name) for name in ("mean", "invstd", "gamma", "beta"))
    graph.input_gradient(dy, weight, da, layer.stride, layer.padding)
    xhat = graph.pointwise("mul", graph.pointwise("sub", x, mean), invstd)
    z = graph.pointwise("add", graph.pointwise("mul", xhat, gamma), beta)
    dz = graph.tensor(layer.input, "dz", dtype)
    graph.relu_backward(da, z, dz)
    out = (graph.row(channels, name) for name in ("dgamma", "dbeta", "a", "b", "c"))
    graph.norm_weight_gradients(dz, x, mean, invstd, gamma, *out)
    return graph


def wgrad(layer: Layer, dtype: torch.dtype) -> Graph:
    graph = Graph()
    dy, x = graph.tensor(layer.output, "dy", dtype), graph.tensor(layer.input, "x", dtype)
    dweight = graph.tensor(layer.weight, "dweight", dtype)
    graph.weight_gradient(dy, _normalized(graph, x, dtype), dweight, layer.stride, layer.padding)
    return graph


#: A graph's description, and the names of what it writes.
GRAPHS = {
    "preact_conv_forward": (forward, ("y", "sum", "squares")),
    "preact_conv_dgrad": (dgrad, ("dz", "dgamma", "dbeta", "a", "b", "c")),
    "preact_conv_wgrad": (wgrad, ("dweight",)),
}
#: The graphs that do a primitive's work, in turn.
PRIMITIVES = {name: (name,) for name in GRAPHS} | {
    "preact_conv_backward_1x1": ("preact_conv_dgrad", "preact_conv_wgrad")
}


def arguments(name: str, prepared: Prepared) -> tuple:
    """Of the primitive that a graph is an equal of, out of a case's arguments."""
    if prepared.case.primitive == name:
        return prepared.args
    dy, weight, x, bn, dz_in, slope, want_bias = prepared.args
    geometry = prepared.case.layer.geometry
    if name == "preact_conv_dgrad":
        return dy, weight, x, bn, dz_in, slope, *geometry
    return dy, x, bn, weight, slope, *geometry, want_bias


def as_cudnn_takes_it(name: str, args: tuple) -> tuple:
    """The arguments with scale and shift rounded to the dtype where the graph reads them so."""
    if name == "preact_conv_dgrad":
        return args
    at, x = (1, args[0]) if name == "preact_conv_forward" else (2, args[1])
    bn = args[at].clone()
    bn[2:] = bn[2:].to(x.dtype)
    return *args[:at], bn, *args[at + 1 :]


def tensors(name: str, prepared: Prepared) -> dict[str, Tensor]:
    """What a graph reads, and room for what it writes."""
    args, norm = as_cudnn_takes_it(name, arguments(name, prepared)), prepared.norm
    if name == "preact_conv_forward":
        x, bn, weight = args[:3]
        found = {"x": x, "weight": weight}
    elif name == "preact_conv_dgrad":
        dy, weight, x, bn = args[:4]
        found = {"dy": dy, "weight": weight, "x": x, "mean": bn[0], "invstd": bn[1], "gamma": norm[2],
                 "beta": norm[3]}  # fmt: skip
    else:
        dy, x, bn = args[:3]
        found = {"dy": dy, "x": x}
    if name != "preact_conv_dgrad":
        found |= {"scale": bn[2].to(x.dtype), "shift": bn[3].to(x.dtype)}
    describe, written = GRAPHS[name]
    specs = describe(prepared.case.layer, x.dtype).named
    for output in written:
        spec = specs[output]
        found[output] = torch.empty(
            spec.shape, dtype=spec.dtype, device=x.device, memory_format=torch.channels_last
        )
    # Rows of a table may begin anywhere; cuDNN is promised an alignment.
    return {key: t.clone() if t.dim() == 1 else t for key, t in found.items()}


def verify(name: str, prepared: Prepared, found: dict[str, Tensor]) -> None:
    """AssertionError unless the outputs are right: activations and weight gradients by the trust rule,
    against the oracle of our own kernels; sums against those of what was stored.

    The coefficients a, b, c follow from the sums and are not read by anything here."""
    args = as_cudnn_takes_it(name, arguments(name, prepared))
    plain, oracle = prepared.expected(name, args)[0]
    what = f"cuDNN's {name}"
    if name == "preact_conv_forward":
        y = found["y"]
        assert_trusted(y, plain, oracle, what)
        _check_sums(found["sum"], y.float(), f"{what}, sum")
        _check_sums(found["squares"], y.float().square(), f"{what}, squares")
    elif name == "preact_conv_dgrad":
        x, bn, dz = args[2], args[3], found["dz"]
        mean, invstd, scale, shift = (row.view(1, -1, 1, 1) for row in bn)
        # ReLU's derivative jumps at 0, and another order of rounding falls on another side of it there.
        z, size = x * scale + shift, x.abs() * scale.abs() + (mean * scale).abs() + shift.abs()
        at_zero = z.abs() <= 8 * torch.finfo(torch.float32).eps * size
        assert_trusted(torch.where(at_zero, oracle.to(dz.dtype), dz), plain, oracle, what)
        _check_sums(found["dbeta"], dz.float(), f"{what}, dbeta")
        _check_sums(found["dgamma"], dz * ((x - mean) * invstd), f"{what}, dgamma")
    else:
        assert_trusted(found["dweight"], plain, oracle, what)


def _check_sums(sums: Tensor, terms: Tensor, what: str) -> None:
    """A sum of n float32 terms in an order that is not ours: its error grows like sqrt(n) roundings of the
    sum of their sizes (Higham 2002, section 4.2, in its statistical form)."""
    terms = terms.double()
    allowed = (
        (terms.numel() / terms.shape[1]) ** 0.5 * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2, 3))
    )
    error = (sums.flatten() - terms.sum((0, 2, 3))).abs()
    assert (error <= allowed).all(), f"{what}: error {error.max().item():.3e} > {allowed.max().item():.3e}"


@dataclass(frozen=True)
class Chosen:
    """The fastest plan of a graph that is right."""

    call: Callable[[], None]
    name: str


def choose(name: str, prepared: Prepared, timer: Timer, planner: Planner | None = None) -> Chosen:
    """Build every plan that cuDNN proposes, time each, and take the fastest one whose results are right.

    Raises:
        CudnnError: cuDNN has none, or none of them ran.
        AssertionError: every one that ran is wrong.
    """
    found = tensors(name, prepared)
    describe, written = GRAPHS[name]
    graph = describe(prepared.case.layer, found["x"].dtype)
    plans, reasons = (planner or _on_this_device)(graph)
    workspace = torch.empty(max((p.workspace for p in plans), default=0) + 16, dtype=torch.int8,
                            device=found["x"].device)  # fmt: skip
    timed = []
    for index, candidate in enumerate(plans):
        try:
            call = candidate.bind(found, workspace)
            timed.append((timer.quick(call), index, call))
        except RuntimeError as error:
            reasons.append(str(error))
    for _, index, call in sorted(timed, key=lambda entry: entry[:2]):
        for output in written:
            found[output].fill_(torch.nan)
        call()
        try:
            verify(name, prepared, found)
        except AssertionError as error:
            reasons.append(str(error))
            continue
        return Chosen(call, f"{plans[index].name}, plan {index + 1} of {len(plans)}")
    raise (AssertionError if timed else CudnnError)("; ".join(dict.fromkeys(reasons)))


def _on_this_device(graph: Graph) -> tuple[list, list[str]]:
    return cudnn.plans(graph, cudnn.handle())


def columns(prepared: Prepared, timer: Timer, planner: Planner | None = None) -> dict:
    """A row's columns of the peer: its times and plans, or ``cudnn_declined``, why there are none."""
    try:
        chosen = [choose(name, prepared, timer, planner) for name in PRIMITIVES[prepared.case.primitive]]

        def call() -> None:
            for graph in chosen:
                graph.call()

        timing = timer(call)
        found = {f"cudnn_{q}_us": round(1e6 * getattr(timing, q), 2) for q in ("p20", "p50", "p80")}
        plans = " + ".join(graph.name for graph in chosen)
        return {**found, "cudnn_host_us": round(1e6 * timer.host(call), 2), "cudnn_plan": plans}
    except Exception as error:  # a peer that fails, however it does, is told and stops nothing
        return {"cudnn_declined": " ".join(f"{type(error).__name__}: {error}".split())}
