"""Every Triton kernel and shipped configuration is compiled for sm_80, sm_90 and sm_100, without a GPU.

A configuration fails if it spills registers to local memory, wants more shared memory than the chip has, or,
on sm_90, does not use wgmma in 16 bits, or has ptxas serialise it. `make test` compiles a part (every kernel on
every chip, the largest tiles); RESNET_FUSED_COMPILE=all, or `python tests/test_triton_compile.py` which prints a
table, compiles everything: 4 minutes on 2 cores. Another Triton's code is checked by `pip install --no-deps
--target FOLDER triton==3.6.0` and PYTHONPATH=FOLDER."""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from resnet_fused import triton_kernels

if triton_kernels.unavailable() is not None:
    pytest.skip(triton_kernels.unavailable(), allow_module_level=True)
os.environ.setdefault(
    "TRITON_CACHE_DIR",
    str(Path(__file__).parents[1] / "build" / f"triton-{os.environ.get('TRITON_INTERPRET', 0)}"),
)

#: Shared memory a block can have (CUDA C++ Programming Guide, table of compute capabilities), bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
COMPLETE = os.environ.get("RESNET_FUSED_COMPILE") == "all"


class Case(NamedTuple):
    """One plan to compile: its configuration is forced, its shape only decides which constants the kernel is
    compiled with."""

    arch: int
    primitive: str
    precision: str
    kind: str
    config: tuple
    c: int
    k: int
    kernel: int
    stride: int
    dtype: str
    extras: bool  # bias, residual or dz_in, a leaky activation

    def __str__(self):
        tile = "x".join(map(str, self.config))
        kernel = f"{self.kernel}x{self.kernel}s{self.stride}"
        extras = "-extras" if self.extras else ""
        return (
            f"sm{self.arch}-{self.primitive}-{self.precision}-{self.kind}-{tile}-c{self.c}k{self.k}-{kernel}-"
            f"{self.dtype}{extras}"
        )


def _shape(primitive, kind, config, classes) -> tuple[int, int]:
    """(C, K) that fill the tile; off it for a kind that is for such channel counts."""
    if kind.endswith("unaligned"):
        return 35, 35
    if primitive == "preact_conv_forward":
        # More input channels than a persistent kernel takes.
        return (8 if kind.startswith("pointwise") else 1) * config.depth, config.columns
    if primitive == "preact_conv_dgrad":
        return config.columns, config.depth
    if primitive == "preact_conv_wgrad":
        return config.rows, config.columns
    # All output channels are one tile: the widest of the class.
    return config.columns, max(width for width, members in classes.items() if config in members)


def cases(complete: bool) -> list:
    """All that is to be compiled: convolutions, then passes over memory."""
    return convolution_cases(complete) + pass_cases(complete)


def convolution_cases(complete: bool) -> list[Case]:
    from resnet_fused.triton_kernels import configs

    found = []
    for name, primitives in configs.shipped().items():
        arch = int(name.removeprefix("sm_"))
        for primitive, precisions in primitives.items():
            if primitive == "elementwise":
                continue
            for precision, kinds in precisions.items():
                for kind, classes in kinds.items():
                    members = list(dict.fromkeys(config for row in classes.values() for config in row))
                    found += _cases_of_kind(complete, arch, primitive, precision, kind, classes, members)
    return found


def _cases_of_kind(complete, arch, primitive, precision, kind, classes, members) -> list[Case]:
    dtype = "bfloat16" if precision == "16bit" else "float32"
    kernel = 1 if kind.startswith(("persistent", "pointwise")) else 3
    every = [
        Case(
            arch, primitive, precision, kind, c, *_shape(primitive, kind, c, classes), kernel, 1, dtype, True
        )
        for c in members
    ]
    if kind.endswith("-more"):
        return every if complete else []
    if not complete:
        # Every kernel on every chip; on sm_90 in 16 bits also its largest tile.
        if precision != "16bit" and (arch != 90 or kind.endswith("unaligned")):
            return []
        largest = max(every, key=lambda case: case.config.rows * case.config.columns)
        return (
            [every[-1], largest]
            if (arch, precision) == (90, "16bit") and largest != every[-1]
            else every[-1:]
        )
    first = every[0]
    if precision == "16bit" and kernel == 3:
        # Other geometries, narrow channels, the other dtype without extras.
        every += [first._replace(stride=2), first._replace(kernel=1), first._replace(kernel=1, stride=2)]
        every.append(first._replace(dtype="float16", extras=False))
        if not kind.endswith("unaligned"):
            every.append(first._replace(c=16, k=16))
    return every


class PassCase(NamedTuple):
    """One elementwise plan to compile, with every option of its kernel, or the finalize launches."""

    arch: int
    primitive: str
    precision: str
    config: tuple
    c: int
    dtype: str

    def __str__(self):
        tile = "x".join(map(str, self.config))
        return f"sm{self.arch}-{self.primitive}-{self.precision}-{tile}-c{self.c}-{self.dtype}"

    def launches(self):
        import importlib

        from resnet_fused.triton_kernels import configs, launch
        from resnet_fused.triton_kernels.geometry import window_geometry

        module = importlib.import_module(f"resnet_fused.triton_kernels.{self.primitive}")
        on, dtype = launch.Target(self.arch, MULTIPROCESSORS[self.arch]), getattr(torch, self.dtype)
        options = {
            "channel_stats": (),
            "bn_act_forward": (0.1,),
            "bn_act_backward": (0.1, True),
            "bn_act_pool_forward": (0.1,),
            "bn_act_pool_backward": (0.1,),
            "preact_apply": (True,),
            "residual_add": (True, self.c, 0.5, 0.1, True),
        }
        if self.primitive == "finalize_forward":
            parameters = (torch.float32, torch.bfloat16, dtype, dtype)
            return [
                module.plan(None, self.c, parameters, False, 1, 1e-5),
                module.plan(None, self.c, (torch.float32, None, None, None), True, 9, 1e-5),
            ]
        if self.primitive == "finalize_backward":
            return [module.plan(None, self.c, 9, True), module.plan(None, self.c, 9, False)]
        if self.primitive == "update_running_stats":
            return [module.plan(None, self.c, (torch.float32, dtype), 9, 0.1)]
        shape = (64, self.c, 28, 28)
        configs.use_measured(lambda problem: self.config)
        try:
            if self.primitive.startswith("max_pool"):
                plan = module.Plan(on, dtype, window_geometry(shape, (3, 3), (2, 2), (1, 1)))
            else:
                plan = module.Plan(on, dtype, shape, *options[self.primitive])
        finally:
            configs.use_measured(None)
        return plan.launches()[:1]  # the mergers are compiled with the convolutions


PASSES = ("channel_stats", "bn_act_forward", "bn_act_backward", "bn_act_pool_forward", "bn_act_pool_backward",
          "preact_apply", "residual_add", "max_pool_forward", "max_pool_backward")  # fmt: skip
FINALIZE = ("finalize_forward", "finalize_backward", "update_running_stats")


def pass_cases(complete: bool) -> list[PassCase]:
    from resnet_fused.triton_kernels import configs

    found = []
    for name, tables in configs.shipped().items():
        arch = int(name.removeprefix("sm_"))
        for precision, kinds in tables["elementwise"].items():
            classes = kinds["elementwise"]
            members = [config for row in classes.values() for config in row]
            dtype = "bfloat16" if precision == "16bit" else "float32"
            for primitive in PASSES:
                every = [PassCase(arch, primitive, precision, c, c.columns, dtype) for c in members]
                every += [every[0]._replace(c=35), every[0]._replace(c=1)]
                if not complete:
                    # The largest tile, and on one chip the other dtype and channels that are off the tile.
                    every = every[:1] if precision == "16bit" else []
                    if arch == 90 and precision == "16bit":
                        every.append(every[0]._replace(c=35))
                found += every
        found += [PassCase(arch, primitive, "finalize", (), 64, "bfloat16") for primitive in FINALIZE]
    return found


def launches(case):
    return case.launches() if isinstance(case, PassCase) else convolution_launches(case)


def convolution_launches(case: Case):
    from resnet_fused.triton_kernels import (
        configs,
        launch,
        preact_conv_backward_1x1,
        preact_conv_dgrad,
        preact_conv_forward,
        preact_conv_wgrad,
    )
    from resnet_fused.triton_kernels.geometry import Convolution

    on, dtype = launch.Target(case.arch, MULTIPROCESSORS[case.arch]), getattr(torch, case.dtype)
    pad = case.kernel // 2
    g = Convolution.of(
        (64, case.c, 28, 28),
        (case.k, case.c, case.kernel, case.kernel),
        (case.stride,) * 2,
        (pad, pad),
        (1, 1),
    )
    slope = 0.1 if case.extras else 0.0
    activation = 2 if case.extras else 1
    configs.use_measured(lambda problem: case.config if problem.kind == case.kind.partition("-")[0] else None)
    try:
        if case.primitive == "preact_conv_forward":
            if g.pointwise and case.kind == "tiled":  # would be the persistent kernel
                return []
            bias = dtype if case.extras else None
            plan = preact_conv_forward.Plan(
                on, dtype, g, activation, slope, bias, case.extras, True, case.precision
            )
        elif case.primitive == "preact_conv_dgrad":
            plan = preact_conv_dgrad.Plan(on, dtype, g, slope, case.extras, case.precision)
        elif case.primitive == "preact_conv_wgrad":
            strides = (g.taps * g.c, g.taps, g.s, 1)
            plan = preact_conv_wgrad.Plan(
                on, dtype, g, dtype, strides, activation, slope, case.extras, case.precision
            )
        else:
            plan = preact_conv_backward_1x1.Plan(
                on, dtype, g, dtype, None, slope, case.extras, case.extras, case.precision
            )
    finally:
        configs.use_measured(None)
    return plan.launches()


class Compiled(NamedTuple):
    case: Case | PassCase
    kernel: str
    registers: int
    stack: int
    shared: int
    products: dict[str, int]  # instructions of each matrix unit in the PTX
    left_in_registers: bool  # wgmma takes its left operand from registers
    serialised: list[str]  # what ptxas says of wgmma that it makes wait for each other


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (stack frame and spills) per thread."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        out = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out.stdout)
    return int(found[1]), int(found[2]) + int(found[3])


def serialised(ptx: str, arch: int) -> list[str]:
    """ptxas's warnings of wgmma instructions that it does not let overlap. Others (C7517, C7519) only tell where it
    adds a wait or an arrive."""
    if "wgmma.mma_async" not in ptx:
        return []
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file, tempfile.NamedTemporaryFile() as cubin:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}a", file.name, "-o", cubin.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"\(C75\d\d\) Potential Performance Loss[^\n]*", out.stdout + out.stderr)


def compile_case(case) -> list[Compiled]:
    import triton
    from triton.backends.compiler import GPUTarget

    rows = []
    for launch in launches(case):
        compiled = triton.compile(
            launch.source(), target=GPUTarget("cuda", case.arch, 32), options=launch.options
        )
        registers, stack = resources(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        products = {
            name: ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma") if name in ptx
        }
        left = re.search(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{", ptx) is not None
        name, shared, waits = launch.kernel.__name__, compiled.metadata.shared, serialised(ptx, case.arch)
        rows.append(Compiled(case, name, registers, stack, shared, products, left, waits))
    return rows


def problems(row: Compiled) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if row.stack:
        found.append(f"spills: {row.stack} bytes of local memory per thread ({row.registers} registers)")
    if row.shared > SHARED[row.case.arch]:
        found.append(f"{row.shared} bytes of shared memory, the chip has {SHARED[row.case.arch]}")
    small = ("merge_stats_kernel", "ordered_sum_kernel", "bias_gradient_kernel")
    convolution = isinstance(row.case, Case) and row.kernel not in small
    if convolution and row.case.arch == 90 and row.case.precision == "16bit":
        if "wgmma.mma_async" not in row.products:
            found.append(f"no wgmma, but {row.products}")
        elif row.kernel.endswith("forward_kernel") and not row.left_in_registers:
            found.append("the activation is not in registers")
    # Of 16 columns the product is a small part, and some of Triton's code for it (3.6 to 3.9) waits.
    narrow = row.kernel == "conv_dgrad_kernel" and row.case.config.columns == 16
    found += [] if narrow else row.serialised
    return [f"{row.case} {row.kernel}: {text}" for text in found]


def compile_all(chosen: list):
    """compile_case over two processes; yields as they finish, in order."""
    # Kernels of one primitive beside each other, so that a process finds the small ones in the cache.
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, chosen)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_compiles_without_spills():
    chosen = cases(COMPLETE)
    kernels, found = set(), []
    for rows in compile_all(chosen):
        for row in rows:
            kernels.add((row.case.arch, row.kernel))
            found += problems(row)
    assert not found, "\n".join(found)
    expected = {
        "conv_forward_kernel",
        "pointwise_forward_kernel",
        "conv_dgrad_kernel",
        "conv_wgrad_kernel",
        "backward_1x1_kernel",
        "merge_stats_kernel",
        "ordered_sum_kernel",
        "bias_gradient_kernel",
        *(f"{primitive}_kernel" for primitive in (*PASSES, *FINALIZE)),
    }
    assert kernels >= {(arch, kernel) for arch in SHARED for kernel in expected}


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    bad = 0
    for rows in compile_all([case for case in cases(True) if part in str(case)]):
        for row in rows:
            if row.kernel in ("merge_stats_kernel", "ordered_sum_kernel", "bias_gradient_kernel"):
                continue
            wrong = problems(row)
            bad += len(wrong)
            print(
                f"{row.case} {row.kernel}: {row.registers} registers, {row.shared // 1024} KB shared, "
                f"{row.products}"
                f"{' left operand in registers' if row.left_in_registers else ''}"
                f"{' WRONG: ' + '; '.join(wrong) if wrong else ''}",
                flush=True,
            )
    sys.exit(bool(bad))
