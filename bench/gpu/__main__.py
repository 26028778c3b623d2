"""``python -m bench.gpu``, also ``make gpu``: on a machine with a GPU, from the root of a checkout.

Five parts: correctness of every GPU kernel, compute-sanitizer on the CUDA C++ ones, kernels against their
floor, training steps, and convolutions beside cuDNN's own fused graphs in float16. Each writes
bench/results/gpu-<part>-<device>.json (and .csv) after every row; a part whose results are complete is left
out, one that was cut short goes on, unless --force is given or the device, the versions or the commit differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that a part may take. Together with starting and compiling: below 9 minutes. Of "sanitizer", whose nine runs
#: start Python and CUDA under a tool each, that may be half: the next call does the rest.
BUDGETS = {"correctness": 105, "sanitizer": 110, "kernels": 130, "steps": 140, "cudnn": 50}
#: What part "cudnn" measures where no net is named.
CUDNN_NETS = ("resnetv2_50",)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(BUDGETS)}; default: all")
    parser.add_argument("--force", action="store_true", help="measure anew what is there already")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of each part, instead of its own")
    parser.add_argument("--nets", nargs="+", metavar="NAME", help="default: all of them")
    parser.add_argument("--tune", action="store_true",
                        help="time every candidate configuration and the unfused path first, and keep the "
                             "winners in the cache of measured choices")
    parser.add_argument("--no-cudnn", action="store_true", help="leave the part cudnn out")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # "<net> <contender>": one row of "steps", as JSON
    parser.add_argument("--warm", help=argparse.SUPPRESS)  # "<i>/<n>": compile every n-th case of a part
    found = parser.parse_args(argv)
    for name in found.parts:
        if name not in BUDGETS:
            parser.error(f"unknown part {name!r}, expected one of {', '.join(BUDGETS)}")
    found.parts = [name for name in BUDGETS if name in (found.parts or BUDGETS)]
    if found.no_cudnn:
        found.parts = [name for name in found.parts if name != "cudnn"]
    return found


def prepare() -> None:
    """The checkout's package and the tests' tolerances come first; compiled kernels are kept in build/."""
    for path in (ROOT / "tests", ROOT):
        sys.path.insert(0, str(path))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-gpu"))


def no_gpu() -> str | None:
    """Why there is nothing to measure on, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from resnet_fused.primitives import dispatch

    return dispatch.unavailable("triton")


def cases_of(part: str, nets):
    """What a part that times kernels measures."""
    from . import cases

    return cases.cudnn_cases(nets) if part == "cudnn" else cases.cases(nets)


def warm(share: str, part: str, nets) -> int:
    """Compile a share of the kernels by running them once: a process of several does this."""
    import torch

    import resnet_fused as rf

    from . import cases

    index, count = map(int, share.split("/"))
    with rf.use_backend("triton"):
        for case in cases_of(part, nets)[index::count]:
            try:
                cases.Prepared(case, "cuda").fused()
            except RuntimeError:
                pass  # it is told when the row is measured
    torch.cuda.synchronize()
    return 0


def warm_in_processes(part: str, names: Sequence[str], deadline: float) -> None:
    from .correctness import shards

    count = shards()
    command = [sys.executable, "-m", "bench.gpu", part, "--nets", *names, "--warm"]
    processes = [
        subprocess.Popen(
            [*command, f"{i}/{count}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(count)
    ]
    for process in processes:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a result was wrong; 2 for a bad argument or where there is no GPU."""
    arguments = parse(argv)
    prepare()
    why = no_gpu()
    if why is not None:
        print(f"bench.gpu: there is no GPU to measure on: {why}", file=sys.stderr)
        return 2
    from . import correctness, cudnn_backend, cudnn_graphs, kernels, results, sanitizer, steps, timing
    from .nets import NETS

    unknown = [name for name in arguments.nets or () if name not in NETS]
    if unknown:
        print(f"bench.gpu: unknown net {unknown[0]!r}, expected one of {', '.join(NETS)}", file=sys.stderr)
        return 2
    nets = [NETS[name] for name in arguments.nets or NETS]
    if arguments.cell:
        return steps.cell(arguments.cell)
    if arguments.warm:
        return warm(arguments.warm, *arguments.parts, nets)
    machine, wrong = results.describe("cuda"), 0
    print(", ".join(f"{name} {machine[name]}" for name in ("gpu", "torch", "triton", "commit")))
    for name in arguments.parts:
        if name == "cudnn" and (why := cudnn_backend.unavailable()) is not None:
            print(f"cudnn: left out: {why}")
            continue
        part = results.Part(name, machine, force=arguments.force)
        if part.complete:
            print(f"{name}: complete in {part.path.name}; --force measures anew")
            continue
        deadline = time.monotonic() + (arguments.budget or BUDGETS[name])
        if name == "correctness":
            wrong += correctness.run(part, deadline)
        elif name == "sanitizer":
            wrong += sanitizer.run(part, deadline)
        elif name in ("kernels", "cudnn"):
            some, peer = nets, None
            if name == "cudnn":
                some = nets if arguments.nets else [NETS[net] for net in CUDNN_NETS]
                part.data["cudnn"], peer = cudnn_backend.version(), cudnn_graphs.columns
            half = time.monotonic() + (deadline - time.monotonic()) / 2
            warm_in_processes(name, [net.name for net in some], half)
            timer = timing.Timer("cuda")
            ceilings = timing.Ceilings.measure(timer)
            chosen = cases_of(name, some)
            wrong += kernels.run(part, chosen, "cuda", timer, ceilings, deadline, arguments.tune, peer=peer)
        else:
            wrong += steps.run(part, nets, deadline)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
