"""Prepared launches: everything about a kernel call but its tensors is decided once, then the call costs
little Python.

A primitive's file builds a *plan* for a problem (device, dtypes, shapes, flags): a few :class:`Launch`
objects and the sizes of the buffers between them, kept in an ``lru_cache``. A call looks the plan up,
allocates, and calls the launches with tensors.

Triton's own ``kernel[grid](...)`` classifies every argument at every call (20-40 us of Python). A Launch does
that once: the first call goes through it and yields the compiled kernel, later ones launch that directly, on
the current stream. What Triton would specialise on can then not differ: integers are in the plan (and kernels
do not specialise on them), pointers must be 16-byte aligned, which is checked, and a misaligned tensor takes
Triton's own way. A direct launch passes addresses.

Under TRITON_INTERPRET=1 the same objects run the interpreter on CPU tensors.
"""

import functools
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Plans kept per primitive: far above the number of layers in a net, and a bound for programs whose shapes
#: never repeat.
PLANS = 4096

_POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    None: None,
}


class Target(NamedTuple):
    """What a plan needs to know about a device."""

    arch: int  # compute capability, 80 for 8.0
    multiprocessors: int


#: What the interpreter pretends to be: few multiprocessors, so that small tests have several tiles per
#: program.
INTERPRETED = Target(90, 4)


@functools.cache
def target(device: torch.device) -> Target:
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


_SAME_DEVICE = nullcontext()


def on_device_of(t: Tensor):
    """A context in which t's device is the current one; costs nothing where it already is."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return _SAME_DEVICE


def precision(dtype: torch.dtype) -> str:
    """``"16bit"``, or for float32 ``"tf32"`` where torch.backends allows it for convolutions, else
    ``"ieee"``: names the configurations, and for float32 the matrix product's ``input_precision``."""
    if dtype is not torch.float32:
        return "16bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


class Launch:
    """One kernel prepared for one problem.

    The kernel's parameters must be in this order: tensors, then scalars, then constexprs.

    Args:
        kernel: a ``@triton.jit`` function that does not specialise on its integers.
        grid: up to three sizes.
        dtypes: of the tensors; None for a tensor that is not passed (the kernel gets None).
        scalars: ints below 2**31 and floats.
        constexprs: in order.
        options: ``num_warps``, ``num_stages`` and others of Triton's. Multiplications and additions fuse (its
            default up to 3.9, warned about there), unless ``enable_fp_fusion`` says otherwise.
    """

    __slots__ = ("kernel", "grid", "dtypes", "scalars", "constexprs", "options", "_rest", "_run")

    def __init__(self, kernel, grid, dtypes, scalars, constexprs, **options):
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.dtypes = tuple(dtypes)
        self.scalars = tuple(scalars)
        self.constexprs = tuple(constexprs)
        self.options = {"enable_fp_fusion": True, **options}
        self._rest = self.scalars + self.constexprs
        self._run = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the current device, which must be the tensors'."""
        run = self._run
        if run is None:
            return self._first(tensors)
        # Addresses, which are read anyway: for a tensor Triton's launcher calls data_ptr() and asks the driver whose
        # memory it is (checked by primitives/checks.py).
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        for pointer in pointers:
            if pointer is not None and pointer & 15:
                self.kernel[self.grid](*tensors, *self._rest, **self.options)
                return None
        active = driver.active
        run(*pointers, *self._rest, stream=active.get_current_stream(active.get_current_device()))
        return None

    def _first(self, tensors) -> None:
        """Through Triton's own way, which compiles."""
        for t, dtype in zip(tensors, self.dtypes, strict=True):
            assert dtype is (None if t is None else t.dtype), (self, dtype)
        if not isinstance(self.kernel, JITFunction):
            self.kernel[self.grid](*tensors, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self._rest, **self.options)
        if compiled is not None and not any(t is not None and t.data_ptr() & 15 for t in tensors):
            self._run = compiled[self.grid]

    def source(self) -> "triton.compiler.ASTSource":
        """What Triton compiles for aligned tensors: for compilation without a GPU."""
        names = self.kernel.arg_names
        signature, constants, attributes = {}, {}, {}
        for i, dtype in enumerate(self.dtypes):
            pointer = _POINTER[dtype]
            signature[names[i]] = pointer or "constexpr"
            if pointer is None:
                constants[names[i]] = None
            else:
                attributes[(i,)] = [["tt.divisibility", 16]]
        at = len(self.dtypes)
        for name, value in zip(names[at:], self.scalars, strict=False):
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        at += len(self.scalars)
        for name, value in zip(names[at:], self.constexprs, strict=True):
            signature[name] = "constexpr"
            constants[name] = value
        return triton.compiler.ASTSource(self.kernel, signature, constants, attributes)

    def __repr__(self) -> str:
        arguments = f"{self.dtypes}{self.scalars}{self.constexprs}"
        return f"{self.kernel.__name__}{arguments} grid {self.grid} {self.options}"
