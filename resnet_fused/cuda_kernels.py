"""Which cases the CUDA C++ kernels take, and their operators. They are in torch.ops.resnet_fused_cuda."""

import functools
from collections.abc import Callable

import torch

from . import extension

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = (
    "preact_conv_forward",
    "preact_conv_dgrad",
    "preact_conv_wgrad",
    "preact_conv_backward_1x1",
)
#: Channels of a convolution: its kernels keep scale and shift of all of them in shared memory.
_MAX_CHANNELS = 4096
#: Output channels of preact_conv_backward_1x1: its weight gradient stays in registers.
_MAX_COMBINED = 64
#: Compute capability: cp.async, and mma.sync of bfloat16.
_OLDEST = (8, 0)

# What `expected_faster` reckons with until there are measurements: memory and matrix rates of an H200 (a copy,
# read and written, and a bf16 matrix product), and the part of the matrix rate that a convolution is assumed to
# reach: these kernels use mma.sync on every chip, the library wgmma on Hopper.
_BYTES_PER_SECOND = 4.3e12
_FLOPS_PER_SECOND = {2: 7.9e14, 4: 3.9e14}
_LIBRARY = 0.7
_OURS = {"cuda": 0.35, "triton": 0.45}  # mma.sync; wgmma
# Tiles of 64 x 64 of a weight gradient do 32 flops (float32: 16) for each byte that comes from L2: at its 5.5e12
# bytes a second, 0.23 of the matrix rate at most; Triton's of 64 x 128 a third more.
_OUR_WGRAD = {"cuda": 0.2, "triton": 0.3}
# A launch and the gap before the kernel that waits for it on the same stream: typically a few microseconds;
# unmeasured here. Counted for the elementwise passes and merges that only the unfused path has.
_LAUNCH_SECONDS = 2.5e-6


def unavailable() -> str | None:
    """Why these kernels cannot be used here, or None."""
    if not extension.cuda_loaded():
        built = extension.build_info().get("cuda_reason") or "its library was not loaded"
        return extension.failures.get("cuda", built)
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _too_old()


@functools.cache
def device_limits() -> tuple[tuple[int, int], int | None] | None:
    """The least compute capability and shared memory for a block of the devices that torch sees: a choice of
    backend is not told which one. None without a device; no shared memory where torch does not tell it."""

    def shared(device) -> int | None:
        if hasattr(device, "shared_memory_per_block_optin"):
            return device.shared_memory_per_block_optin
        # Older torch: all but 1 KB of a multiprocessor's, from 8.0 on.
        whole = getattr(device, "shared_memory_per_multiprocessor", None)
        return None if whole is None else whole - 1024

    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    sizes = [shared(device) for device in devices]
    return min((device.major, device.minor) for device in devices), None if None in sizes else min(sizes)


def _too_old() -> str | None:
    limits = device_limits()
    if limits is None or limits[0] >= _OLDEST:
        return None
    return "the cuda kernels need compute capability {}.{}, but a device has {}.{}".format(*_OLDEST, *limits[0])


def shared_bytes(primitive: str, dtype: torch.dtype, geometry) -> int:
    """Shared memory that a block of a convolution takes at most (csrc/kernels/cuda: conv_product.h, conv_halo.h)."""
    size = dtype.itemsize
    if primitive == "preact_conv_backward_1x1":
        return 6 * 64 * 64 * size + 4 * (64 * 72 + 4 * 64)
    if primitive == "preact_conv_wgrad":
        return 3 * 2 * 64 * 128
    k, c, r, s = geometry.weight
    forward = primitive == "preact_conv_forward"
    depth, columns = (c, k) if forward else (k, c)
    width = 32 if columns <= 32 else 64 if columns <= 64 else 128
    epilogue = 4 * (128 * (width + 8) + 2 * (32 if width == 32 else 16) * width + width)
    # A step is 128 bytes of the reduction: of 128 pixels, and of the weights of all columns.
    weights = 128 * width if forward else -(-width * size // 128) * 128 // size * 128
    taps = r * s
    if not forward and geometry.dilation == (1, 1):
        taps = -(-r // geometry.stride[0]) * -(-s // geometry.stride[1])
    chunks = depth * size // 16
    stages = min(3, -(-taps * chunks // 8))
    found = max(stages * (128 * 128 + weights), epilogue) + 128 * 20
    if r == 3 and geometry.stride == geometry.dilation == (1, 1):  # by halo tiles of 200 pixels, perhaps
        halos = 2 if chunks > 8 else 1
        found = max(found, max(3 * weights + halos * 200 * 128 + 16, epilogue) + 128 * 12 + 200 * 8)
    return found + (2 * 4 * depth if forward else 0)


def tf32_allowed() -> bool:
    """Whether the user lets float32 convolutions round their operands to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def declines(primitive: str, dtype: torch.dtype, geometry=None) -> str | None:
    """Why the CUDA kernels leave this case to the unfused path, or None if they take it.

    Args:
        primitive: a primitive's name, such as ``"preact_conv_forward"``.
        dtype: of the activations.
        geometry: for convolutions, anything with the fields of ``primitives.dispatch.ConvGeometry``.
    """
    if dtype not in _DTYPES:
        return f"the cuda kernels do not take {dtype}"
    if (why := _too_old()) is not None:
        return why
    if geometry is None:
        return None
    if geometry.groups != 1:
        return f"the cuda kernels do not take groups={geometry.groups}"
    n, c, h, w = geometry.input
    k, _, r, s = geometry.weight
    if (r, s) not in ((1, 1), (3, 3)):
        return f"the cuda kernels do not take {r}x{s} kernels"
    if max(geometry.stride) > 2:
        return f"the cuda kernels do not take stride {geometry.stride}"
    if c % 8 or k % 8:
        return f"{c} and {k} channels are not multiples of 8"
    if max(c, k) > _MAX_CHANNELS:
        return f"the cuda kernels do not take more than {_MAX_CHANNELS} channels"
    if primitive == "preact_conv_backward_1x1":
        if r > 1 or max(geometry.stride) > 1 or max(geometry.padding) > 0:
            return "one kernel for both gradients is for 1x1 convolutions with stride 1 and no padding"
        if k > _MAX_COMBINED:
            return f"the weight gradient of more than {_MAX_COMBINED} outputs ({k}) does not stay in registers"
    pixels = n * (h + 2 * geometry.padding[0]) * (w + 2 * geometry.padding[1])
    if pixels >= 2**31 - 2**24:
        return f"the cuda kernels count pixels in 32 bits, but there are {pixels}"
    available = (device_limits() or (None, None))[1]
    if available is not None and (needed := shared_bytes(primitive, dtype, geometry)) > available:
        return f"a block needs {needed} bytes of shared memory, but a device has {available}"
    if dtype is torch.float32 and not tf32_allowed():
        return "the cuda kernels multiply float32 as TF32, which torch.backends.cudnn.conv.fp32_precision forbids"
    return None


def expected_faster(primitive: str, dtype: torch.dtype, geometry, backend: str = "cuda") -> bool:
    """Whether a fused convolution should beat the unfused path at this shape, by a model: nothing is measured.

    The unfused path writes and reads a normalised copy of x (in the input gradient, one more gradient of x)
    by launches of their own, but multiplies at the library's rate. Where a convolution is bound by memory, which
    most of a CIFAR net's and the 1x1 ones of others are, or takes little longer than a launch, fusing should win;
    where it is bound by arithmetic, the library. A unit whose convolutions all go one way is one call
    (ops/whole_unit.py); differences below a launch would divide small ones for nothing.

    Args:
        backend: "cuda" or "triton"; where nothing was measured, the model is asked of Triton's kernels, too.
    """
    n, c, h, w = geometry.input
    k, _, r, s = geometry.weight
    size = dtype.itemsize
    p = (h + 2 * geometry.padding[0] - geometry.dilation[0] * (r - 1) - 1) // geometry.stride[0] + 1
    q = (w + 2 * geometry.padding[1] - geometry.dilation[1] * (s - 1) - 1) // geometry.stride[1] + 1
    flops = 2.0 * n * p * q * k * c * r * s
    x, y = float(n * c * h * w * size), float(n * k * p * q * size)
    rate = _FLOPS_PER_SECOND[size]
    # Bytes that our kernel moves, that the library's convolutions move, and the elementwise passes beside these;
    # launches of the latter (forward: activation, statistics and their merge).
    ours, library, elementwise, launches = {
        "preact_conv_forward": (x + y, x + y, 2 * x + y, 3),
        "preact_conv_dgrad": (2 * x + y, x + y, 3 * x, 2),
        "preact_conv_wgrad": (x + y, x + y, 2 * x, 1),
        "preact_conv_backward_1x1": (2 * x + y, 2 * (x + y), 5 * x, 3),
    }[primitive]
    our_share = (_OUR_WGRAD if primitive == "preact_conv_wgrad" else _OURS)[backend]
    if primitive == "preact_conv_backward_1x1":
        flops *= 2

    def seconds(moved, share):
        return max(moved / _BYTES_PER_SECOND, flops / (rate * share))

    beside = elementwise / _BYTES_PER_SECOND + launches * _LAUNCH_SECONDS
    return seconds(ours, our_share) <= seconds(library, _LIBRARY) + beside


def implementation(primitive: str, unfused: Callable | None = None) -> Callable | None:
    """The operator of a primitive, or None if the library does not have it.

    Args:
        unfused: for convolutions: what runs in place of the operator while TF32 is not allowed. The user can
            change that at any time, and a choice of backend is kept.
    """
    if not extension.cuda_loaded() or not hasattr(torch.ops.resnet_fused_cuda, primitive):
        return None
    operator = getattr(torch.ops.resnet_fused_cuda, primitive).default
    if primitive not in _CONVOLUTIONS:
        return operator

    def run(x, *args):
        if x.dtype is torch.float32 and not tf32_allowed():
            return unfused(x, *args)
        return operator(x, *args)

    return run
