"""Part "kernels": every primitive at every layer, verified and then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import resnet_fused as rf
from resnet_fused.primitives import tuner

from .cases import CONVOLUTIONS, Case, Prepared
from .results import Part
from .timing import Ceilings, Timer


def measure(case: Case, device: str, timer: Timer, ceilings: Ceilings, tune: bool = False) -> dict:
    """One row. Times in microseconds; ``share`` is floor / fused."""
    prepared = Prepared(case, device)
    floor = ceilings.floor(case.bytes, case.flops)
    row = {
        "name": case.name,
        "primitive": case.primitive,
        "nets": " ".join(f"{net}:{count}" for net, count in case.nets.items()),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_us": round(1e6 * floor, 2),
        "tuned": tune,
    }
    with rf.use_backend("triton" if device == "cuda" else "auto"):
        row["backend"] = prepared.backend()
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
    return row


def run(
    part: Part,
    chosen: Sequence[Case],
    device: str,
    timer: Timer,
    ceilings: Ceilings,
    deadline: float,
    tune: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Measure what the part lacks, until the deadline (``time.monotonic``); returns how many rows are
    wrong."""
    part.data["ceilings"] = {
        "copy_tb_per_s": round(ceilings.bandwidth / 1e12, 3),
        "bf16_tflop_per_s": round(ceilings.flops / 1e12, 1),
    }
    for case in chosen:
        if part.has(case.name):
            continue
        if time.monotonic() > deadline:
            say(f"kernels: out of time with {len(part.rows)} of {len(chosen)} rows; run it again to go on")
            break
        try:
            part.add(measure(case, device, timer, ceilings, tune))
        except (AssertionError, RuntimeError) as error:
            part.add({"name": case.name, "primitive": case.primitive, "error": str(error).splitlines()[0]})
            say(f"kernels: {part.rows[-1]['name']}: {part.rows[-1]['error']}")
    else:
        part.finish()
    say(summary(part))
    return sum("error" in row for row in part.rows)


def summary(part: Part) -> str:
    """One line per primitive: the median share of the floor, and where fused lost to unfused."""
    lines = []
    for primitive in dict.fromkeys(row["primitive"] for row in part.rows):
        rows = [row for row in part.rows if row["primitive"] == primitive and "error" not in row]
        if not rows:
            continue
        shares = sorted(row["share"] for row in rows)
        line = f"{primitive:26} {len(rows):3} rows, share of the floor: median {shares[len(shares) // 2]:.2f}"
        if primitive in CONVOLUTIONS:
            slower = sum(row["fused_p50_us"] > row["unfused_p50_us"] for row in rows)
            line += f", slower than unfused in {slower}"
        lines.append(line)
    return "\n".join(lines)
