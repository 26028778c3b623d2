"""What was built and how: symbols, SIMD levels, the CUDA switch, the doctor, installs that must fail."""

import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch

from resnet_fused import doctor, extension
from resnet_fused.primitives import dispatch
from resnet_fused.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(extension.__file__).parent
OBJECTS = ROOT / "build" / sysconfig.get_platform() / "obj"
LIBRARIES = sorted(extension.LIBRARY_DIRECTORY.glob("libresnet_fused_*.so"))
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "avx512_amx")

needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a checkout")


def needs_tool(name):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


def output_of(*command, **arguments):
    return subprocess.run(command, capture_output=True, text=True, check=True, **arguments).stdout


def symbols(path, *options):
    """(type, name) of each symbol, names as the linker has them."""
    lines = output_of("nm", *options, str(path)).splitlines()
    return [(fields[-2], fields[-1].split("@")[0]) for fields in map(str.split, lines) if len(fields) >= 2]


def python(code, *, path=None, **variables):
    environment = {**os.environ, **variables}
    environment.pop("RESNET_FUSED_CPU_LEVEL", None) if "RESNET_FUSED_CPU_LEVEL" not in variables else None
    environment["PYTHONPATH"] = str(path or PACKAGE.parent)
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)


# ---- the libraries


def test_the_cpu_library_is_loaded():
    assert extension.cpu_available()
    assert {name: reason for name, reason in extension.failures.items() if name != "cuda"} == {}


@needs_tool("nm")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_ask_torch_for_its_stable_functions_only(library):
    undefined = [name for _, name in symbols(library, "-D", "--undefined-only")]
    # Mangled names of at::, c10::, torch:: and caffe2:: change from one torch to the next; so do Python's.
    unstable = [name for name in undefined if re.match(r"_Z\w*?(2at|3c10|5torch|6caffe2)(?!\d)", name)]
    assert unstable == []
    assert [name for name in undefined if re.match(r"_?Py[A-Z_]", name)] == []
    assert any(name.startswith("aoti_torch_") for name in undefined)


@needs_tool("nm")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_export_nothing(library):
    assert symbols(library, "-D", "--defined-only") == []


@needs_tool("readelf")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_need_no_python_and_no_fixed_place(library):
    dynamic = output_of("readelf", "-d", str(library))
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    allowed = r"libtorch_cpu|libstdc\+\+|libgcc_s|libm|libc|ld-linux.*"
    if "cuda" in library.name:
        allowed += "|libtorch_cuda|libcudart"
    assert [name for name in needed if not re.fullmatch(rf"({allowed})\.so(\.\d+)?", name)] == []
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_tool("nm")
@pytest.mark.skipif(not OBJECTS.is_dir(), reason="no objects: installed from elsewhere")
@pytest.mark.parametrize("variant", LEVELS)
def test_nothing_compiled_for_one_simd_level_is_shared_with_another(variant):
    # The linker keeps one copy of an inline function or a template's instance. Were it the AVX-512 one, a CPU
    # without AVX-512 would meet an illegal instruction anywhere.
    if variant not in extension.build_info()["cpu_variants"]:
        pytest.skip("not compiled on this architecture")
    own = f"12resnet_fused{len(variant)}{variant}"
    # The level of matrix tiles has products of its own only.
    pattern = r"preact_conv_\w+|table" if variant == "avx512_amx" else r"\w+"
    sources = {path.name for path in ROOT.glob("csrc/kernels/cpu/*.cpp") if re.fullmatch(pattern, path.stem)}
    objects = [path for path in (OBJECTS / variant).rglob("*.o") if path.stem in sources]
    assert len(objects) == len(sources)
    escaped = [(path.name, name) for path in objects
               for _, name in symbols(path, "--defined-only", "--extern-only") if own not in name]
    assert escaped == []


@needs_tool("objdump")
@pytest.mark.skipif(not OBJECTS.is_dir(), reason="no objects: installed from elsewhere")
def test_code_for_every_cpu_has_no_avx_registers():
    if "avx2" not in extension.build_info()["cpu_variants"]:
        pytest.skip("not an x86-64 build")
    objects = [path for path in OBJECTS.rglob("*.o")
               if path.relative_to(OBJECTS).parts[0] not in LEVELS[1:] and "cuda" not in path.relative_to(OBJECTS).parts]
    assert objects
    wide = [path.name for path in objects if re.search(r"%[yz]mm\d", output_of("objdump", "-d", str(path)))]
    assert wide == []


# ---- the module _C


def test_module_agrees_with_the_library_and_the_package():
    info = extension.build_info()
    assert info["version"] == __version__
    assert info["cpu_variants"] == LEVELS[: len(info["cpu_variants"])]
    levels = extension.cpu_levels()
    assert levels and levels == LEVELS[: len(levels)]
    assert torch.ops.resnet_fused_cpu.set_simd_level(-1) == len(levels) - 1
    assert (info["cuda"] is None) == (info["cuda_reason"] != "") == (info["cuda_architectures"] == ())
    assert (info["cuda"] is not None) == (extension.LIBRARY_DIRECTORY / "libresnet_fused_cuda.so").exists()


def test_module_knows_nothing_of_torch():
    path = next(PACKAGE.glob("_C.*.so"))
    code = (f"import importlib.util as u, sys; spec = u.spec_from_file_location('_C', {str(path)!r});"
            "m = u.module_from_spec(spec); spec.loader.exec_module(m); assert 'torch' not in sys.modules;"
            "print(m.cpu_levels())")
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(extension.cpu_levels())


# ---- SIMD levels


def test_every_simd_level_can_be_forced():
    highest = len(extension.cpu_levels()) - 1
    try:
        for level in range(len(LEVELS)):
            assert torch.ops.resnet_fused_cpu.set_simd_level(level) == min(level, highest)
            assert torch.ops.resnet_fused_cpu.simd_level() == min(level, highest)
    finally:
        torch.ops.resnet_fused_cpu.set_simd_level(-1)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512_bf16", "avx512_amx"])
def test_environment_sets_the_first_simd_level(name):
    code = "import torch, resnet_fused; print(torch.ops.resnet_fused_cpu.simd_level())"
    result = python(code, RESNET_FUSED_CPU_LEVEL=name)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == min(LEVELS.index(name), len(extension.cpu_levels()) - 1)


def test_unknown_simd_level_in_the_environment_raises():
    code = "import torch, resnet_fused; torch.ops.resnet_fused_cpu.channel_stats(torch.ones(3, 2, 1, 1))"
    result = python(code, RESNET_FUSED_CPU_LEVEL="avx3")
    assert result.returncode != 0
    assert f"RESNET_FUSED_CPU_LEVEL should be one of {', '.join(LEVELS)}, but got 'avx3'" in result.stderr


# ---- a build that does not load, and the doctor


def test_smoke_test_of_the_binary_interface():
    # .ci/run starts it under other versions of torch.
    script = str(ROOT / "tests" / "abi_smoke.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"runs under torch {torch.__version__}" in result.stdout


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_library_that_does_not_load_is_told_and_breaks_nothing(damage, tmp_path):
    package = tmp_path / "resnet_fused"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    if damage == "garbage":
        (package / "lib").mkdir()
        (package / "lib" / "libresnet_fused_cpu.so").write_bytes(b"not a library")
    code = """if True:
        import sys, torch, resnet_fused as rf
        from resnet_fused import doctor, extension
        assert not extension.cpu_available()
        y = rf.functional.preact_conv2d(
            torch.ones(2, 3, 4, 4), None, None, None, None, torch.ones(5, 3, 1, 1), training=True, momentum=0.1,
            eps=1e-5, stride=1, padding=0, dilation=1, groups=1)
        assert y.shape == (2, 5, 4, 4)
        sys.exit(doctor.main([]))"""
    result = python(code, path=tmp_path)
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and "Traceback" not in result.stderr
    assert "problem: the CPU operator library did not load" in result.stdout
    assert "mend: " in result.stdout
    assert ("was not built" if damage == "missing" else "libresnet_fused_cpu.so") in result.stdout


def test_doctor_reports(capsys):
    report = doctor.report()
    assert report["ok"] and report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["level"] in report["cpu"]["levels"]
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "The CPU backend works." in text
    assert report["triton"] == dispatch.unavailable("triton")
    assert "Triton kernels  " + ("not in use: " if report["triton"] else "in use") in text
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == report["versions"]


def test_doctor_names_the_command_that_mends(monkeypatch):
    monkeypatch.setitem(extension.failures, "cpu", "undefined symbol: f")
    monkeypatch.setattr(extension, "_loaded", set())
    report = doctor.report()
    assert not report["ok"]
    (problem,) = [p for p in report["problems"] if "undefined symbol: f" in p["problem"]]
    assert "pip install" in problem["mend"]


@needs_checkout
def test_doctor_knows_what_training_needs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(doctor._TRAINING) == sorted(extras["train"])


@pytest.mark.skipif(not extension.cuda_loaded(), reason="no CUDA library in this build, or torch has no CUDA")
def test_the_cuda_library_runs_without_a_gpu():
    assert torch.ops.resnet_fused_cuda.runtime_version() >= 12000
    assert extension.cuda_available() == torch.cuda.is_available()
    if torch.cuda.is_available():
        assert torch.ops.resnet_fused_cuda.kernel_architecture(0) >= 80


# ---- building


def build(**variables):
    """Starts a build whose result goes nowhere; it must fail before it compiles."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "FORCE_CUDA")}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", os.devnull + "/none"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**environment, **variables})


@needs_checkout
@pytest.mark.parametrize("variables, looked_for", [
    ({"CXX": "/nonexistent/c++"}, "looked for CXX=/nonexistent/c++"),
    ({"PATH": "/nonexistent"}, "looked for c++, g++, clang++ on PATH"),
], ids=["CXX", "PATH"])
def test_without_a_compiler_the_build_says_so_in_one_line(variables, looked_for):
    result = build(**variables)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: resnet_fused: no working C++ compiler")
    assert looked_for in last and "set CXX=" in last


@pytest.fixture
def setup_functions(monkeypatch):
    """What setup.py defines, without the setup."""
    for name in ("FORCE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A stand-in for nvcc 12.4, first on PATH, that answers what the build asks."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"""#!/bin/sh
case "$1" in
  --dryrun) echo '#$ TOP={tmp_path}/cuda' >&2 ;;
  --version) echo 'Cuda compilation tools, release 12.4, V12.4.131' ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
esac
""")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    return path


@needs_checkout
def test_cuda_is_built_where_torch_and_nvcc_agree(setup_functions, nvcc, monkeypatch):
    find = setup_functions["find_cuda"]
    home = nvcc.parent.parent.resolve()
    assert find("2.10.0+cu126", "12.6") == (home, "12.4", "")
    assert find("2.13.0+cpu", None) == (None, None, "torch 2.13.0+cpu is built without CUDA")
    mismatch = find("2.15.0+cu132", "13.2")
    assert mismatch[0] is None and "nvcc is of CUDA 12.4 but torch is built for 13.2" in mismatch[2]
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert find("2.15.0+cu132", "13.2") == (home, "12.4", "")
    with pytest.raises(SystemExit, match="FORCE_CUDA=1, but torch 2.13.0.cpu is built without CUDA"):
        find("2.13.0+cpu", None)
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert find("2.10.0+cu126", "12.6") == (None, None, "FORCE_CUDA=0")
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(SystemExit, match="FORCE_CUDA should be 0 or 1, but got 'yes'"):
        find("2.10.0+cu126", "12.6")


@needs_checkout
def test_cuda_architectures_are_those_asked_for_or_those_nvcc_knows(setup_functions, nvcc, monkeypatch):
    architectures = setup_functions["cuda_architectures"]
    names, flags = architectures(nvcc)
    assert names == "8.0;9.0a"  # of the default list: this nvcc does not know 10.0
    assert flags[1::2] == ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    names, flags = architectures(nvcc)
    assert flags[1::2] == ["arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
    for wrong, message in (("Hopper", "but got 'Hopper'"), ("12.0", "which this nvcc does not know")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(SystemExit, match=message):
            architectures(nvcc)


@needs_checkout
def test_source_distribution_has_every_source(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist"]
    subprocess.run([*command, "--dist-dir", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "tests/test_build.py"}
    wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob("resnet_fused/**/*.py")}
    assert wanted - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []
