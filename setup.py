"""Builds the operator libraries and the module _C with ninja; the rest of the package is in pyproject.toml.

resnet_fused/lib/libresnet_fused_cpu.so   csrc/{ops,kernels}/*.cpp; csrc/kernels/cpu/*.cpp once per SIMD level
resnet_fused/lib/libresnet_fused_cuda.so  csrc/ops/cuda/*.cpp, csrc/kernels/cuda/*.cu, where CUDA is built
resnet_fused/_C.*.so                      csrc/module.cpp: pybind11, knows nothing of torch

`setup.py build_emulator` builds build/<platform>/libresnet_fused_cuda_emulated.so for the tests: the CUDA
library's own sources with tests/cuda_emulator in the place of CUDA.

The libraries use torch's stable ABI and hold no Python: one build serves torch 2.10 and everything newer.

Environment: CXX; MAX_JOBS; VERBOSE=1; CUDA_HOME; TORCH_CUDA_ARCH_LIST, for example "8.0;9.0a;10.0+PTX";
FORCE_CUDA=1|0 (otherwise CUDA is built where torch.version.cuda and an nvcc of the same major version are).
"""

import fcntl
import filecmp
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "resnet_fused" / "version.py"))["__version__"]
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that a build runs under
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # of these, what nvcc knows

CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
             "-pthread", "-DNDEBUG", "-Wall"]
AVX2 = ["-mavx2", "-mfma", "-mprfchw"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AVX512_AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
# For tests on a CPU that has AVX2 only (make emulated): slow. -O1: the emulator's loops take long to compile.
if os.environ.get("RESNET_FUSED_EMULATE_AVX512"):
    CXX_FLAGS = [*CXX_FLAGS, "-DRF_EMULATE_AVX512"]
    AVX512 = AVX512_BF16 = AVX512_AMX = [*AVX2, "-O1", "-include", "tests/avx512_emulator.h"]
# Every multiply-add of the kernels is one rounding where the CPU has FMA, with every compiler: GCC's default,
# said. psabi: vectors wider than a level's registers are passed between its own functions only.
VARIANT_FLAGS = ["-ffp-contract=fast", "-Wno-psabi"]
# Kernels that name RF_DTYPE are compiled once for each of these, side by side.
CUDA_DTYPES = ("float", "bfloat16", "float16")
VARIANTS = [("generic", [])]  # position = level, as in cpu_kernels.h
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS += [("avx2", AVX2), ("avx512", AVX512), ("avx512_bf16", AVX512_BF16), ("avx512_amx", AVX512_AMX)]
# Sources of a level that has only some kernels of its own, and the level before's for the rest.
VARIANT_SOURCES = {"avx512_amx": ("preact_*.cpp", "table.cpp")}


def fail(message):
    raise SystemExit(f"error: resnet_fused: {message}")


def ask(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def first_line(*command):
    """The first line that a command prints, None if it fails or prints none."""
    try:
        answer = ask(*command)
        return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 else None
    except (OSError, IndexError):
        return None


def find_compiler():
    """The C++ compiler as a command line and what it calls itself."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if version := first_line(*command, "--version"):
            return command, version
    looked_for = f"CXX={candidates[0]}" if len(candidates) == 1 else ", ".join(candidates) + " on PATH"
    fail(f"no working C++ compiler (looked for {looked_for}); install GCC >= 11 or Clang >= 14 "
         "(Debian and Ubuntu: apt-get install g++) or set CXX=/path/to/compiler")


def find_ninja():
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    return shutil.which("ninja") or fail("ninja was not found; pip install ninja")


def find_torch():
    """Directory, version and CUDA version of torch, read without importing it (seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        fail("torch >= 2.10 was not found; pip install torch, or install without --no-build-isolation")
    home = Path(spec.origin).parent
    about = runpy.run_path(str(home / "version.py"))
    if tuple(int(part) for part in re.findall(r"\d+", about["__version__"])[:2]) < (2, 10):
        fail(f"torch >= 2.10 is needed to build, but got {about['__version__']}; pip install --upgrade torch")
    return home, str(about["__version__"]), about.get("cuda")


def find_cuda(torch_version, torch_cuda):
    """(CUDA home, nvcc version, reason): the home is None where CUDA is not built, for the reason given."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        fail(f"FORCE_CUDA should be 0 or 1, but got {force!r}")
    if force == "0":
        return None, None, "FORCE_CUDA=0"
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    compilers = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    compilers.insert(1 if homes[0] else 0, "nvcc")
    nvcc = next(filter(None, map(shutil.which, compilers)), None)
    # A wrapper on PATH may be a script: nvcc itself names the toolkit's directory.
    dry_run = nvcc and ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull).stderr
    top = nvcc and re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    release = top and re.search(r"release (\d+\.\d+)", ask(nvcc, "--version").stdout)
    if torch_cuda is None:
        reason = f"torch {torch_version} is built without CUDA"
    elif not release:
        reason = f"torch is built for CUDA {torch_cuda} but no nvcc was found (set CUDA_HOME)"
    elif release[1].split(".")[0] != torch_cuda.split(".")[0] and force != "1":
        reason = f"nvcc is of CUDA {release[1]} but torch is built for {torch_cuda} (FORCE_CUDA=1 tries anyway)"
    else:
        return Path(top[1].strip()).resolve(), release[1], ""
    if force == "1":
        fail(f"FORCE_CUDA=1, but {reason}")
    return None, None, reason


def cuda_architectures(nvcc):
    """The architecture list to compile for, and its flags for nvcc."""
    known = set(re.findall(r"\d+", ask(nvcc, "--list-gpu-arch").stdout))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names, flags = [], []
    for name in re.split(r"[;,\s]+", (asked or CUDA_ARCHITECTURES).strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            fail(f'TORCH_CUDA_ARCH_LIST should be like "8.0;9.0a;10.0+PTX", but got {asked!r}')
        number = match[1] + match[2]
        if number.rstrip("af") not in known:
            if asked:
                fail(f"TORCH_CUDA_ARCH_LIST has {name}, which this nvcc does not know (only {sorted(known)})")
            continue
        names.append(name)
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return ";".join(names), flags


class Ninja:
    """A build.ninja under construction. Sources and outputs are relative to the project, where ninja runs."""

    def __init__(self, directory):
        self.directory = directory
        self.lines = [f"builddir = {self.path(directory)}"]

    @staticmethod
    def path(path):
        return re.sub(r"([$ :])", r"$\1", os.path.relpath(path, ROOT))

    @staticmethod
    def flags(flags):
        return shlex.join(map(str, flags)).replace("$", "$$")

    def rule(self, name, command, dependencies=True):
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if dependencies:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output, rule, inputs, flags):
        inputs = " ".join(map(self.path, inputs))
        extra = " | csrc/exports.map" if rule == "link" else ""
        self.lines += [f"build {self.path(output)}: {rule} {inputs}{extra}", f"  flags = {self.flags(flags)}"]
        return output

    def objects(self, rule, sources, flags, variant=""):
        """One object per source, under a directory for the variant."""
        top = self.directory / "obj" / variant

        def name(source):
            return source.relative_to(ROOT / "csrc" if source.is_relative_to(ROOT / "csrc") else ROOT)

        return [self.build(top / f"{name(source)}.o", rule, [source], flags) for source in sources]

    def cuda_kernels(self, rule, flags, variant=""):
        """The objects of csrc/kernels/cuda."""
        sources = sorted(ROOT.glob("csrc/kernels/cuda/*.cu"))
        typed = [source for source in sources if "RF_DTYPE" in source.read_text()]
        objects = self.objects(rule, [source for source in sources if source not in typed], flags, variant)
        for dtype in CUDA_DTYPES:
            objects += self.objects(rule, typed, [*flags, f"-DRF_DTYPE={dtype}"], f"{variant}{dtype}")
        return objects

    def run(self, ninja, outputs):
        write_if_changed(self.directory / "build.ninja", "\n".join(self.lines) + "\n")
        command = [ninja, "-f", os.path.relpath(self.directory / "build.ninja", ROOT)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        command += ["-v"] * bool(os.environ.get("VERBOSE"))
        command += [os.path.relpath(output, ROOT) for output in outputs]
        if subprocess.run(command, cwd=ROOT).returncode:
            fail("the C++ build failed; the compiler's messages are above")


def write_if_changed(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def open_build_directory():
    """One directory for every torch and Python: ninja sees which commands changed, and kernels know neither."""
    directory = ROOT / "build" / sysconfig.get_platform()
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / ".lock", "w")  # until the results are delivered: ninja expects no company
    fcntl.flock(lock, fcntl.LOCK_EX)
    return directory, lock


def stable_flags(torch):
    """What compiling and linking against torch's stable ABI takes."""
    return ([f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", torch / "include"],
            ["-pthread", f"-L{torch / 'lib'}", "-Wl,--as-needed,-z,defs,--version-script=csrc/exports.map"])


class BuildLibraries(build_ext):
    """Builds everything in build/<platform>/ and copies the results to where setuptools wants them."""

    def run(self):
        if sys.platform != "linux":
            fail(f"only Linux is supported, but got {sys.platform}")
        compiler, compiler_version = find_compiler()
        ninja = find_ninja()
        torch, torch_version, torch_cuda = find_torch()
        if importlib.util.find_spec("pybind11") is None:
            fail("pybind11 was not found; pip install pybind11, or install without --no-build-isolation")
        import pybind11

        cuda, cuda_version, no_cuda = find_cuda(torch_version, torch_cuda)
        if no_cuda and torch_cuda:
            print(f"resnet_fused: building for CPU and Triton only: {no_cuda}", file=sys.stderr)
        architectures, architecture_flags = cuda_architectures(cuda / "bin" / "nvcc") if cuda else ("", [])

        directory, lock = open_build_directory()
        facts = {"VERSION": VERSION, "TORCH": torch_version, "COMPILER": compiler_version,
                 "CUDA": cuda_version or "", "CUDA_ARCHITECTURES": architectures, "NO_CUDA": no_cuda,
                 "VARIANTS": ",".join(name for name, _ in VARIANTS)}
        header = "".join('#define RF_BUILD_{} "{}"\n'.format(name, re.sub(r'(["\\])', r"\\\1", value))
                         for name, value in facts.items())
        write_if_changed(directory / "include" / "build_facts.h", "#pragma once\n" + header)

        build = Ninja(directory)
        cxx = build.flags(compiler)
        build.rule("cxx", f"{cxx} $flags -MMD -MF $out.d -c $in -o $out")
        build.rule("link", f"{cxx} -shared $in -o $out $flags", dependencies=False)
        stable, link = stable_flags(torch)

        csrc = ROOT / "csrc"
        flags = [*CXX_FLAGS, "-Icsrc"]
        objects = build.objects("cxx", sorted(csrc.glob("ops/*.cpp")), flags + stable)
        objects += build.objects("cxx", sorted(csrc.glob("kernels/*.cpp")), flags)
        for level, (name, machine) in enumerate(VARIANTS):
            variant = [f"-DRF_VARIANT={name}", f"-DRF_LEVEL={level}", *VARIANT_FLAGS, *machine]
            sources = sorted(source for pattern in VARIANT_SOURCES.get(name, ["*.cpp"])
                             for source in csrc.glob(f"kernels/cpu/{pattern}"))
            objects += build.objects("cxx", sources, flags + variant, name)
        cpu = build.build(directory / "libresnet_fused_cpu.so", "link", objects, [*link, "-ltorch_cpu"])
        products = {cpu: "lib/libresnet_fused_cpu.so"}

        if cuda:
            host_compiler = [word for word in compiler if not word.startswith("-")][-1]  # without ccache
            nvcc = build.flags([cuda / "bin" / "nvcc", "-ccbin", host_compiler])
            build.rule("nvcc", f"{nvcc} $flags -MD -MF $out.d -c $in -o $out")
            host = ["-Xcompiler", ",".join(("-fPIC", "-fvisibility=hidden", "-Wall"))]
            objects = build.cuda_kernels("nvcc", ["-O3", "-std=c++20", "-DNDEBUG", "-Icsrc", *host,
                                                  *architecture_flags])
            objects += build.objects("cxx", sorted(csrc.glob("ops/cuda/*.cpp")),
                                     [*flags, *stable, "-DUSE_CUDA", "-isystem", cuda / "include"])
            library = build.build(directory / "libresnet_fused_cuda.so", "link", objects,
                                  [*link, f"-L{cuda / 'lib64'}", "-ltorch_cuda", "-ltorch_cpu", "-lcudart"])
            products[library] = "lib/libresnet_fused_cuda.so"

        python = sysconfig.get_paths()["include"]
        if not Path(python, "Python.h").exists():
            fail(f"Python.h was not found in {python}; install Python's headers (Debian and Ubuntu: "
                 "apt-get install python3-dev)")
        includes = [f"-I{directory / 'include'}", "-isystem", python, "-isystem", pybind11.get_include()]
        module = build.objects("cxx", [csrc / "module.cpp"], [*flags, *includes])
        module = build.build(directory / "_C.so", "link", module, [])
        products[module] = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

        build.run(ninja, products)
        self.deliver(products)

    def deliver(self, products):
        package = Path(self.get_ext_fullpath("resnet_fused._C")).parent
        (package / "lib").mkdir(parents=True, exist_ok=True)
        for old in package.glob("lib/libresnet_fused_*.so"):  # of an earlier build, with CUDA
            if str(old.relative_to(package)) not in products.values():
                old.unlink()
        for source, name in products.items():
            target = package / name
            if not target.exists() or not filecmp.cmp(source, target, shallow=False):
                # Renamed into place: a process may have the old one mapped.
                shutil.copy2(source, f"{target}.new")
                os.replace(f"{target}.new", target)

    def get_source_files(self):
        return []  # MANIFEST.in names them


class BuildEmulator(Command):
    """The CUDA library for the CPU: its kernels' and wrappers' sources, with the tests' emulator below them."""

    description = "build the emulated CUDA library for the tests"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        compiler, _ = find_compiler()
        torch, _, _ = find_torch()
        directory, lock = open_build_directory()
        build = Ninja(directory / "emulator")
        cxx = build.flags(compiler)
        build.rule("cxx", f"{cxx} $flags -MMD -MF $out.d -c $in -o $out")
        build.rule("link", f"{cxx} -shared $in -o $out $flags", dependencies=False)
        stable, link = stable_flags(torch)
        # One rounding where the source says fmaf, and nowhere else.
        flags = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
                 "-ffp-contract=off", "-DRF_EMULATE", "-Icsrc", "-Itests/cuda_emulator"]
        objects = build.cuda_kernels("cxx", [*flags, "-x", "c++"])
        wrappers = [path for path in sorted(ROOT.glob("csrc/ops/cuda/*.cpp")) if path.stem != "device"]
        objects += build.objects("cxx", [*wrappers, *sorted(ROOT.glob("tests/cuda_emulator/*.cpp"))],
                                 [*flags, *stable])
        library = build.build(directory / "libresnet_fused_cuda_emulated.so", "link", objects,
                              [*link, "-ltorch_cpu"])
        build.run(find_ninja(), [library])


setup(ext_modules=[Extension("resnet_fused._C", sources=[])],
      cmdclass={"build_ext": BuildLibraries, "build_emulator": BuildEmulator})
