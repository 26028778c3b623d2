"""``resnet-fused doctor``: what is installed, what was built, what this machine runs, and how to mend it."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import torch

from resnet_fused import extension
from resnet_fused.primitives import dispatch
from resnet_fused.version import __version__

_SOURCE = Path(__file__).resolve().parent.parent


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(arguments: str) -> str:
    return f"{shlex.quote(sys.executable)} -m pip install {arguments}"


def _rebuild(environment: str = "") -> str:
    """The command that builds this installation anew, from where it was installed."""
    if (_SOURCE / "setup.py").exists():
        return environment + _pip(f"--no-build-isolation -e {shlex.quote(str(_SOURCE))}")
    try:
        installed = importlib.metadata.distribution("resnet_fused")
        origin = json.loads(installed.read_text("direct_url.json"))["url"]
    except (importlib.metadata.PackageNotFoundError, TypeError, KeyError):
        origin = "resnet_fused"
    return environment + _pip(f"--no-cache-dir --force-reinstall --no-deps {shlex.quote(origin)}")


def _cpu() -> dict:
    info = {
        "available": extension.cpu_available(),
        "levels": list(extension.cpu_levels()),
        "level": None,
        "threads": torch.get_num_threads(),
    }
    if info["available"]:
        try:
            level = torch.ops.resnet_fused_cpu.simd_level()
            info["level"] = extension.build_info().get("cpu_variants", ())[level]
        except (RuntimeError, IndexError) as error:  # an unknown RESNET_FUSED_CPU_LEVEL
            info["available"] = False
            info["error"] = str(error).splitlines()[0]
    return info


def _gpus() -> list[dict]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "kernels": None,
        }
        if extension.cuda_loaded():
            try:
                built = torch.ops.resnet_fused_cuda.kernel_architecture(index)
                gpu["kernels"] = f"{built // 10}.{built % 10}"
            except RuntimeError as error:
                gpu["error"] = str(error).splitlines()[0]
        gpus.append(gpu)
    return gpus


def _problems(report: dict) -> list[dict]:
    """Each with what is wrong and the command that mends it, the gravest first."""
    problems = []

    def add(what, mend):
        problems.append({"problem": what, "mend": mend})

    failures, build = report["failures"], report["build"]
    if "cpu" in failures:
        add(f"the CPU operator library did not load: {failures['cpu']}", _rebuild())
    if "_C" in failures:
        add(f"the module _C did not load: {failures['_C']}", _rebuild())
    if "error" in report["cpu"]:
        add(f"the CPU operators do not run: {report['cpu']['error']}", "unset RESNET_FUSED_CPU_LEVEL")
    if build and build["version"] != __version__:
        add(f"the compiled parts are of version {build['version']}, Python's of {__version__}", _rebuild())
    if "cuda" in failures and torch.version.cuda is not None:
        add(f"the CUDA operator library did not load: {failures['cuda']}", _rebuild("FORCE_CUDA=1 "))
    if not report["gpus"] and shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            add("there is an NVIDIA driver, but torch is built without CUDA", _pip("--force-reinstall torch"))
        else:
            add("there is an NVIDIA driver, but torch sees no GPU", "nvidia-smi")
    if report["gpus"]:
        if not extension.cuda_loaded() and "cuda" not in failures:
            add(f"there is a GPU, but no CUDA operators were built: {build.get('cuda_reason', 'unknown')}",
                _rebuild("CUDA_HOME=/path/to/cuda FORCE_CUDA=1 "))
        if report["versions"]["triton"] is None:
            add("there is a GPU, but triton is not installed", _pip("triton"))
        for gpu in report["gpus"]:
            if "error" in gpu:
                add(f"the CUDA operators do not run on {gpu['name']}: {gpu['error']}",
                    _rebuild(f"TORCH_CUDA_ARCH_LIST={gpu['capability']} FORCE_CUDA=1 "))
    missing = [name for name, module in _TRAINING.items() if importlib.util.find_spec(module) is None]
    if missing:
        add(f"`resnet-fused train` and `demo` need {', '.join(missing)}", _pip(" ".join(missing)))
    return problems


# The extra "train": distribution -> module.
_TRAINING = {
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "pyarrow": "pyarrow",
    "pillow": "PIL",
}


def report() -> dict:
    """Everything the doctor knows, ready for JSON.

    Keys: ``versions``, ``build`` (what was built, see :func:`extension.build_info`), ``cpu`` (``available``,
    ``levels`` this CPU runs, the ``level`` in force, ``threads``), ``gpus``, ``triton`` (why the Triton kernels
    are not in use, or None), ``failures`` (what did not load and why), ``environment`` (RESNET_FUSED_* variables), ``problems`` (each a ``problem`` and the command to ``mend``
    it) and ``ok``: whether the CPU backend works.
    """
    result = {
        "versions": {
            "resnet_fused": __version__,
            "torch": torch.__version__,
            "triton": _version_of("triton"),
            "numpy": _version_of("numpy"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": extension.build_info(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "triton": dispatch.unavailable("triton"),
        "failures": dict(extension.failures),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("RESNET_FUSED_")
        },
    }
    result["problems"] = _problems(result)
    result["ok"] = result["cpu"]["available"]
    return result


def _lines(found: dict):
    def line(name, value):
        return f"{name:<16}{value}"

    build, cpu = found["build"], found["cpu"]
    for name, version in found["versions"].items():
        yield line(name, version or "not installed")
    if build:
        yield line("built with", f"torch {build['torch']}, {build['compiler']}")
        yield line("built for", "CPU " + ", ".join(build["cpu_variants"]))
        if build["cuda"]:
            yield line("", f"CUDA {build['cuda']}, architectures {', '.join(build['cuda_architectures'])}")
            if "cuda" in found["failures"]:
                yield line("", f"CUDA is not in use: {found['failures']['cuda']}")
        else:
            yield line("", f"no CUDA: {build['cuda_reason']}")
    runs = f"runs {', '.join(cpu['levels'])}; {cpu['threads']} threads"
    yield line("this CPU", runs + (f"; in force: {cpu['level']}" if cpu["level"] else ""))
    for gpu in found["gpus"]:
        kernels = f"runs code for {gpu['kernels']}" if gpu["kernels"] else "no CUDA operators"
        yield line("GPU", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB; {kernels}")
    if not found["gpus"]:
        yield line("GPU", "none")
    yield line("Triton kernels", "in use" if found["triton"] is None else f"not in use: {found['triton']}")
    for name, value in found["environment"].items():
        yield line("set", f"{name}={value}")
    for problem in found["problems"]:
        yield f"problem: {problem['problem']}"
        yield f"   mend: {problem['mend']}"
    does_not = "The CPU backend does not work; the reference backend does."
    yield "The CPU backend works." if found["ok"] else does_not


def main(argv: list[str] | None = None) -> int:
    """Prints the report; 0 if the CPU backend works, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="resnet-fused doctor",
        description="Tell what is installed, what was built and how to mend what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(_lines(found)))
    return 0 if found["ok"] else 1
