"""Part "kernels": every primitive at every layer, verified and then timed. Part "cudnn": the same of the
convolutions beside cuDNN's fused graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import resnet_fused as rf
from resnet_fused.primitives import dispatch, tuner

from .cases import CONVOLUTIONS, Case, Prepared
from .results import Part
from .timing import Ceilings, Timer

#: Measures another library at a case and gives its columns; it never raises.
Peer = Callable[[Prepared, Timer], dict]


def backends(device: str) -> tuple[str, ...]:
    """Whose kernels to measure, one after the other."""
    if device != "cuda":
        return ("auto",)
    return tuple(name for name in ("triton", "cuda") if dispatch.unavailable(name) is None)


def row_name(case: Case, backend: str) -> str:
    return case.name if backend in ("auto", "triton") else f"{case.name} {backend}"


def measure(
    case: Case,
    device: str,
    timer: Timer,
    ceilings: Ceilings,
    tune: bool = False,
    backend: str = "auto",
    peer: Peer | None = None,
) -> dict:
    """One row. Times in microseconds; ``share`` is floor / fused. ``declined``, and no times, where the backend
    leaves the case to another. ``peer`` gives further columns."""
    prepared = Prepared(case, device)
    floor = ceilings.floor(case.bytes, case.flops)
    row = {
        "name": row_name(case, backend),
        "primitive": case.primitive,
        "nets": " ".join(f"{net}:{count}" for net, count in case.nets.items()),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_us": round(1e6 * floor, 2),
        "tuned": tune,
    }
    with rf.use_backend(backend):
        row["backend"] = prepared.backend()
        if backend == "cuda" and row["backend"] != "cuda":
            return {**row, "declined": True}
        prepared.verify()
        if tune and row["backend"] == "triton":
            tuner.tune(case.primitive, *prepared.args)
        ways = {"fused": prepared.fused, "unfused": prepared.unfused(), "eager": prepared.eager}
        for way, call in ways.items():
            if call is None:
                continue
            timing = timer(call)
            for quantile in ("p20", "p50", "p80"):
                row[f"{way}_{quantile}_us"] = round(1e6 * getattr(timing, quantile), 2)
            if way != "eager":
                row[f"{way}_host_us"] = round(1e6 * timer.host(call), 2)
            if way == "fused":
                row["share"] = round(floor / timing.p50, 4)
    return row if peer is None else {**row, **peer(prepared, timer)}


def run(
    part: Part,
    chosen: Sequence[Case],
    device: str,
    timer: Timer,
    ceilings: Ceilings,
    deadline: float,
    tune: bool = False,
    say: Callable[[str], None] = print,
    peer: Peer | None = None,
) -> int:
    """Measure what the part lacks, until the deadline (``time.monotonic``); returns how many rows are
    wrong."""
    part.data["ceilings"] = {
        "copy_tb_per_s": round(ceilings.bandwidth / 1e12, 3),
        "bf16_tflop_per_s": round(ceilings.flops / 1e12, 1),
    }
    title = part.data["part"]
    wanted = [(case, backend) for case in chosen for backend in backends(device)]
    for case, backend in wanted:
        name = row_name(case, backend)
        if part.has(name):
            continue
        if time.monotonic() > deadline:
            say(f"{title}: out of time with {len(part.rows)} of {len(wanted)} rows; run it again to go on")
            break
        try:
            known = _peer_columns(part, case)
            part.add(measure(case, device, timer, ceilings, tune, backend, None if known else peer) | known)
        except (AssertionError, RuntimeError) as error:
            part.add({"name": name, "primitive": case.primitive, "error": str(error).splitlines()[0]})
            say(f"{title}: {name}: {part.rows[-1]['error']}")
    else:
        part.finish()
    say(summary(part))
    return sum("error" in row for row in part.rows)


def _peer_columns(part: Part, case: Case) -> dict:
    """The peer is measured once for a case, beside the first backend's kernels."""
    rows = (row for row in part.rows if row["name"] in (row_name(case, "triton"), row_name(case, "cuda")))
    return next(filter(None, ({k: v for k, v in row.items() if k.startswith("cudnn_")} for row in rows)), {})


def summary(part: Part) -> str:
    """One line per primitive and backend: the median share of the floor, and where fused lost to unfused."""
    lines = []
    measured = [row for row in part.rows if "share" in row]
    for primitive, backend in dict.fromkeys((row["primitive"], row["backend"]) for row in measured):
        rows = [row for row in measured if (row["primitive"], row["backend"]) == (primitive, backend)]
        shares = sorted(row["share"] for row in rows)
        line = f"{primitive:26} {backend:9} {len(rows):3} rows, share of the floor: median {shares[len(shares) // 2]:.2f}"
        if primitive in CONVOLUTIONS:
            slower = sum(row["fused_p50_us"] > row["unfused_p50_us"] for row in rows)
            line += f", slower than unfused in {slower}"
        lines.append(line + _beside_cudnn(rows))
    return "\n".join(lines)


def _beside_cudnn(rows: list[dict]) -> str:
    ratios = sorted(row["cudnn_p50_us"] / row["fused_p50_us"] for row in rows if "cudnn_p50_us" in row)
    reasons = [row["cudnn_declined"] for row in rows if "cudnn_declined" in row]
    line = ""
    if ratios:
        slower = sum(ratio < 1 for ratio in ratios)
        line = f", cuDNN's graph / fused: median {ratios[len(ratios) // 2]:.2f}, slower than it in {slower}"
    return line + (f", no cuDNN graph in {len(reasons)}: {reasons[0]}" if reasons else "")
