"""What the compiler made of the CUDA kernels, read from the library that the build left: no GPU and no second
compilation."""

import functools
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resnet_fused import extension

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = extension.LIBRARY_DIRECTORY / "libresnet_fused_cuda.so"
OBJECTS = ROOT / "build" / sysconfig.get_platform() / "obj"
DTYPES = ("float", "bfloat16", "float16")
#: That a multiprocessor has.
REGISTERS = 65536

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"no CUDA library: {extension.build_info().get('cuda_reason', 'not built')}"
)


@functools.cache
def cuobjdump() -> str:
    triton = pytest.importorskip("triton", reason="Triton's package has the disassembler")
    return triton.knobs.nvidia.cuobjdump.path


def dump(option: str, path: Path) -> str:
    return subprocess.run([cuobjdump(), option, str(path)], capture_output=True, text=True, check=True).stdout


def by_architecture(text: str) -> dict[str, str]:
    """A dump cut at its "arch = sm_90a" lines."""
    parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        found[name] = found.get(name, "") + part
    return found


def architectures() -> set[str]:
    return {
        "sm_" + name.replace("+PTX", "").replace(".", "")
        for name in extension.build_info()["cuda_architectures"]
    }


def resources() -> dict[str, dict[str, tuple[int, int]]]:
    """Architecture -> kernel -> registers, bytes of local memory per thread."""
    pattern = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    return {
        name: {
            kernel: (int(reg), int(stack) + int(local)) for kernel, reg, stack, local in pattern.findall(part)
        }
        for name, part in by_architecture(dump("--dump-resource-usage", LIBRARY)).items()
    }


def test_no_kernel_spills():
    found = resources()
    assert set(found) >= architectures() and architectures()
    spilled = [
        f"{name} {kernel}: {registers} registers, {local} bytes of local memory"
        for name, kernels in found.items()
        for kernel, (registers, local) in kernels.items()
        if local
    ]
    assert not spilled, "\n".join(spilled)
    for kernels in found.values():
        for kernel in ("14forward_kernel", "12dgrad_kernel"):
            assert sum(kernel in name for name in kernels) == 6 * len(DTYPES), (
                kernel
            )  # 32, 64, 128 columns; lines, halos
        assert sum("12wgrad_kernel" in name for name in kernels) == len(DTYPES)
        # The widest block is 256 threads.
        assert all(registers * 256 <= REGISTERS for registers, _ in kernels.values())


@pytest.mark.skipif(not OBJECTS.is_dir(), reason="no objects: installed from elsewhere")
def test_convolutions_use_tensor_cores_and_asynchronous_copies():
    stems = ("preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad", "preact_conv_backward_1x1")
    cases = [(dtype, stem) for dtype in DTYPES for stem in stems]

    def disassembled(case):
        dtype, stem = case
        return by_architecture(dump("--dump-sass", OBJECTS / dtype / "kernels" / "cuda" / f"{stem}.cu.o"))

    product = {"float": "HMMA.1688.F32.TF32", "bfloat16": "HMMA.16816.F32.BF16", "float16": "HMMA.16816.F32"}
    with ThreadPoolExecutor(2) as pool:
        for (dtype, stem), found in zip(cases, pool.map(disassembled, cases), strict=True):
            assert set(found) == architectures()
            for name, code in found.items():
                where = f"{stem} of {dtype} for {name}"
                assert re.search(re.escape(product[dtype]) + r"(?!\.BF16\b)" * (dtype == "float16"), code), (
                    where
                )
                assert "LDGSTS" in code, f"{where}: no cp.async"
                if dtype != "float" or stem != "preact_conv_wgrad":  # 32-bit elements are transposed by hand
                    assert "LDSM" in code, f"{where}: no ldmatrix"
                assert not re.search(r"\b(LDL|STL)\b", code), f"{where}: local memory"
                assert not re.search(r"\b(RED|ATOM)\w*\.\w*F(16|32|ADD)", code), f"{where}: a float atomic"
