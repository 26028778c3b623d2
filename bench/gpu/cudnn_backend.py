"""cuDNN's graph API (its C "backend" API) through ctypes: tensors, operations, execution plans.

Not through nvidia-cudnn-frontend: its Python interface (1.32) has no operation for BatchNorm's weight
gradients, and the library itself is there wherever PyTorch is built with CUDA. Descriptors, attributes and
their numbers are those of cudnn_graph.h; cuDNN keeps them within a major version.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SONAME = "libcudnn.so.9"

_FLOAT32 = 0  # cudnnDataType_t: what every operation computes in
_DATA_TYPES = {torch.float32: _FLOAT32, torch.float16: 2, torch.bfloat16: 9}

# cudnnBackendAttributeType_t
_HANDLE, _DATA_TYPE, _BOOLEAN, _INT64, _FLOAT, _VOID_PTR = 0, 1, 2, 3, 4, 6
_CONVOLUTION_MODE, _HEUR_MODE, _POINTWISE_MODE, _DESCRIPTOR, _GENSTATS_MODE, _CHAR = 7, 8, 14, 15, 16, 24
_C_TYPES = {_HANDLE: ctypes.c_void_p, _BOOLEAN: ctypes.c_bool, _INT64: ctypes.c_int64, _FLOAT: ctypes.c_float,
            _VOID_PTR: ctypes.c_void_p, _DESCRIPTOR: ctypes.c_void_p, _CHAR: ctypes.c_char}  # fmt: skip

# cudnnBackendDescriptorType_t
_POINTWISE, _CONVOLUTION, _ENGINE, _ENGINECFG, _ENGINEHEUR, _PLAN = 0, 1, 2, 3, 4, 5
_OPERATION_GRAPH, _VARIANT_PACK, _TENSOR, _DEVICE_PROPERTIES = 15, 16, 17, 38

#: cudnnPointwiseMode_t
_MODES = {"add": 0, "mul": 1, "sub": 9, "relu": 100, "relu_backward": 200}
#: The operations: kind of descriptor, and the attributes that take the tensors, in the order of
#: :class:`Graph`.
_OPERATIONS = {
    **dict.fromkeys(("add", "mul", "sub"), (13, (751, 752, 753))),
    "relu": (13, (751, 753)),
    "relu_backward": (13, (757, 751, 756)),
    "convolution": (10, (704, 703, 705)),
    "input_gradient": (12, (711, 709, 710)),
    "weight_gradient": (11, (717, 716, 715)),
    "channel_sums": (14, (772, 773, 774)),
    "norm_weight_gradients": (23, (1625, 1624, 1621, 1622, 1623, 1626, 1627, 1628, 1629, 1630)),
}
#: Convolutions: the attributes of alpha, beta and the geometry.
_SCALED = {
    "convolution": (700, 701, 702),
    "input_gradient": (706, 707, 708),
    "weight_gradient": (712, 713, 714),
}

_HEURISTICS = (3, 2)  # mode A, then the fallback
_ALIGNMENT = 16  # bytes


class CudnnError(RuntimeError):
    """What cuDNN said: the call, the status and, where it gives one, the reason."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library that PyTorch has loaded, or the one that the loader finds; OSError where there is none."""
    found = ctypes.CDLL(SONAME)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name, types in {
        "cudnnCreate": [pointer],
        "cudnnSetStream": [pointer, pointer],
        "cudnnBackendCreateDescriptor": [ctypes.c_int, pointer],
        "cudnnBackendDestroyDescriptor": [pointer],
        "cudnnBackendFinalize": [pointer],
        "cudnnBackendSetAttribute": [pointer, ctypes.c_int, ctypes.c_int, size, pointer],
        "cudnnBackendGetAttribute": [pointer, ctypes.c_int, ctypes.c_int, size, pointer, pointer],
        "cudnnBackendExecute": [pointer, pointer, pointer],
    }.items():
        getattr(found, name).argtypes = types
    found.cudnnGetErrorString.restype = ctypes.c_char_p
    found.cudnnGetVersion.restype = ctypes.c_size_t
    return found


def unavailable() -> str | None:
    """Why there is no graph API to call, or None."""
    try:
        version = library().cudnnGetVersion()
    except (OSError, AttributeError) as error:
        return f"no {SONAME} with the graph API: {error}"
    return None if version >= 90000 else f"cuDNN {version} is older than 9"


def version() -> str:
    number = library().cudnnGetVersion()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _check(status: int, call: str) -> None:
    if status == 0:
        return
    text = ctypes.create_string_buffer(1024)
    if hasattr(library(), "cudnnGetLastErrorString"):
        library().cudnnGetLastErrorString(text, ctypes.c_size_t(len(text)))
    reason = " ".join(text.value.decode(errors="replace").split())
    name = library().cudnnGetErrorString(status).decode()
    raise CudnnError(f"{call}: {name}" + (f": {reason}" if reason else ""))


def _array(kind: int, values: Sequence) -> ctypes.Array:
    values = [value.pointer if isinstance(value, Descriptor) else value for value in values]
    return (_C_TYPES.get(kind, ctypes.c_int) * len(values))(*values)


class Descriptor:
    """A backend descriptor, destroyed with the object. ``parts`` keeps alive what it refers to."""

    def __init__(self, kind: int) -> None:
        self.pointer, self.parts = ctypes.c_void_p(), []
        _check(library().cudnnBackendCreateDescriptor(kind, ctypes.byref(self.pointer)), f"create({kind})")
        self.kind = kind

    def __del__(self) -> None:
        if self.pointer:
            library().cudnnBackendDestroyDescriptor(self.pointer)

    def set(self, attribute: int, kind: int, *values) -> Descriptor:
        self.parts += [value for value in values if isinstance(value, Descriptor)]
        array = _array(kind, values)
        status = library().cudnnBackendSetAttribute(self.pointer, attribute, kind, len(values), array)
        _check(status, f"set({self.kind}, {attribute})")
        return self

    def finalize(self) -> Descriptor:
        _check(library().cudnnBackendFinalize(self.pointer), f"finalize({self.kind})")
        return self

    def get(self, attribute: int, kind: int, into: Sequence = ()) -> tuple[int, ctypes.Array]:
        """(how many there are, what was read into an array like ``into``)."""
        array, count = _array(kind, into), ctypes.c_int64()
        status = library().cudnnBackendGetAttribute(
            self.pointer, attribute, kind, len(into), ctypes.byref(count), array if into else None
        )
        _check(status, f"get({self.kind}, {attribute})")
        return count.value, array


@functools.cache
def handle() -> ctypes.c_void_p:
    """A handle on the current CUDA stream; it lives as long as the process."""
    made = ctypes.c_void_p()
    _check(library().cudnnCreate(ctypes.byref(made)), "cudnnCreate")
    stream = torch.cuda.current_stream().cuda_stream
    _check(library().cudnnSetStream(made, ctypes.c_void_p(stream)), "cudnnSetStream")
    return made


def device_properties(json: str) -> Descriptor:
    """A device that is not there, to plan for (cuDNN >= 9.11)."""
    data = json.encode()
    found = Descriptor(_DEVICE_PROPERTIES)
    return found.set(2702, _CHAR, *(data[i : i + 1] for i in range(len(data)))).finalize()


@dataclass(frozen=True)
class Spec:
    """A tensor of a graph: (N, C, H, W) that lie in memory as NHWC, a weight's (K, C, R, S) as KRSC. Without
    a name it is not stored ("virtual")."""

    uid: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str


class Graph:
    """A description of operations on tensors; nothing of cuDNN's is called until :func:`plans`."""

    def __init__(self) -> None:
        self.tensors: list[Spec] = []
        #: (kind, tensors, (stride, padding) of a convolution)
        self.operations: list[tuple[str, tuple[Spec, ...], tuple]] = []

    def tensor(self, shape: Sequence[int], name: str = "", dtype: torch.dtype = torch.float32) -> Spec:
        self.tensors.append(Spec(len(self.tensors) + 1, tuple(shape), dtype, name))
        return self.tensors[-1]

    def row(self, channels: int, name: str, dtype: torch.dtype = torch.float32) -> Spec:
        return self.tensor((1, channels, 1, 1), name, dtype)

    def pointwise(self, mode: str, x: Spec, *b: Spec) -> Spec:
        """x mode b, of "add", "mul" and "sub"; or "relu" of x."""
        y = self.tensor(x.shape)
        self.operations.append((mode, (x, *b, y), ()))
        return y

    def relu_backward(self, dy: Spec, x: Spec, dx: Spec) -> None:
        """dx = dy where x > 0, else 0."""
        self.operations.append(("relu_backward", (dy, x, dx), ()))

    def convolution(self, x: Spec, weight: Spec, y: Spec, stride, padding) -> None:
        self.operations.append(("convolution", (x, weight, y), (stride, padding)))

    def input_gradient(self, dy: Spec, weight: Spec, dx: Spec, stride, padding) -> None:
        self.operations.append(("input_gradient", (dy, weight, dx), (stride, padding)))

    def weight_gradient(self, dy: Spec, x: Spec, dweight: Spec, stride, padding) -> None:
        self.operations.append(("weight_gradient", (dy, x, dweight), (stride, padding)))

    def channel_sums(self, x: Spec, sums: Spec, squares: Spec) -> None:
        """Per channel the sum of x and of its squares (GENSTATS)."""
        self.operations.append(("channel_sums", (x, sums, squares), ()))

    def norm_weight_gradients(
        self, dz: Spec, x: Spec, mean: Spec, invstd: Spec, gamma: Spec, *out: Spec
    ) -> None:
        """BN_BWD_WEIGHTS. out: dgamma, dbeta, and A, B, C of BatchNorm's input gradient A * dz + B * x +
        C."""
        self.operations.append(("norm_weight_gradients", (dz, x, mean, invstd, gamma, *out), ()))

    @property
    def named(self) -> dict[str, Spec]:
        return {spec.name: spec for spec in self.tensors if spec.name}


def _tensor(spec: Spec) -> Descriptor:
    _, c, h, w = spec.shape
    made = Descriptor(_TENSOR).set(901, _DATA_TYPE, _DATA_TYPES[spec.dtype]).set(902, _INT64, *spec.shape)
    made.set(903, _INT64, c * h * w, 1, c * w, c).set(906, _INT64, spec.uid)
    return made.set(900, _INT64, _ALIGNMENT).set(907, _BOOLEAN, not spec.name).finalize()


def _operation(kind: str, tensors: list[Descriptor], geometry: tuple) -> Descriptor:
    descriptor, attributes = _OPERATIONS[kind]
    made = Descriptor(descriptor)
    for attribute, tensor in zip(attributes, tensors, strict=True):
        made.set(attribute, _DESCRIPTOR, tensor)
    if kind in _MODES:
        mode = Descriptor(_POINTWISE).set(0, _POINTWISE_MODE, _MODES[kind]).set(1, _DATA_TYPE, _FLOAT32)
        made.set(750, _DESCRIPTOR, mode.finalize())
    elif kind in _SCALED:
        alpha, beta, convolution = _SCALED[kind]
        made.set(alpha, _FLOAT, 1.0).set(beta, _FLOAT, 0.0).set(
            convolution, _DESCRIPTOR, _geometry(*geometry)
        )
    elif kind == "channel_sums":
        made.set(770, _GENSTATS_MODE, 0).set(771, _DATA_TYPE, _FLOAT32)
    else:
        made.set(1620, _DATA_TYPE, _FLOAT32)
    return made.finalize()


def _geometry(stride: Sequence[int], padding: Sequence[int]) -> Descriptor:
    made = Descriptor(_CONVOLUTION).set(100, _DATA_TYPE, _FLOAT32).set(101, _CONVOLUTION_MODE, 1)
    made.set(102, _INT64, 1, 1).set(103, _INT64, *stride).set(104, _INT64, *padding)
    return made.set(105, _INT64, *padding).set(106, _INT64, 2).finalize()


def plans(graph: Graph, handle=None, device: Descriptor | None = None) -> tuple[list[Plan], list[str]]:
    """(every plan that cuDNN's heuristics propose and that could be built, in their order; why there are not
    more). On a handle; or for a device that is not there."""
    tensors = {spec.uid: _tensor(spec) for spec in graph.tensors}
    operations = [_operation(kind, [tensors[s.uid] for s in specs], g) for kind, specs, g in graph.operations]
    lowered = Descriptor(_OPERATION_GRAPH).set(801, _DESCRIPTOR, *operations)
    if handle is not None:
        lowered.set(800, _HANDLE, handle)
    lowered.finalize()
    found, reasons = [], []
    for mode in _HEURISTICS:
        try:
            configs = _configurations(lowered, mode, device)
        except CudnnError as error:
            reasons.append(f"heuristics: {error}")
            continue
        for config in configs:
            try:
                found.append(Plan(graph, config, handle, device))
            except CudnnError as error:
                reasons.append(str(error))
        if found:
            break
    if not found and not reasons:
        reasons.append("cuDNN's heuristics propose no engine for this graph")
    return found, list(dict.fromkeys(reasons))


def _configurations(graph: Descriptor, mode: int, device: Descriptor | None) -> list[Descriptor]:
    query = Descriptor(_ENGINEHEUR).set(201, _DESCRIPTOR, graph).set(200, _HEUR_MODE, mode)
    if device is not None:
        query.set(204, _DESCRIPTOR, device)
    query.finalize()
    count, _ = query.get(202, _DESCRIPTOR)
    configs = [Descriptor(_ENGINECFG) for _ in range(count)]
    found = query.get(202, _DESCRIPTOR, configs)[0] if configs else 0
    for config in configs:
        config.parts.append(query)
    return configs[:found]


class Plan:
    """An execution plan: a kernel, or several, chosen and compiled.

    Attributes:
        workspace: bytes of device memory that it works in.
        name: cuDNN's engine.
    """

    def __init__(self, graph: Graph, config: Descriptor, handle, device: Descriptor | None) -> None:
        self._graph, self._handle = graph, handle
        self._plan = Descriptor(_PLAN).set(401, _DESCRIPTOR, config)
        if handle is not None:
            self._plan.set(400, _HANDLE, handle)
        if device is not None:
            self._plan.set(407, _DESCRIPTOR, device)
        self._plan.finalize()
        self.workspace: int = self._plan.get(402, _INT64, [0])[1][0]
        engine = Descriptor(_ENGINE)
        config.get(300, _DESCRIPTOR, [engine])
        self.name = f"engine {engine.get(1301, _INT64, [0])[1][0]}"

    def bind(self, tensors: dict[str, torch.Tensor], workspace: torch.Tensor) -> Callable[[], None]:
        """The plan as a call on these tensors, which it keeps: nothing is allocated in a call."""
        check_tensors(self._graph, tensors)
        specs = self._graph.named
        pack = Descriptor(_VARIANT_PACK).set(1000, _INT64, *(spec.uid for spec in specs.values()))
        pack.set(1001, _VOID_PTR, *(tensors[name].data_ptr() for name in specs))
        pack.set(1003, _VOID_PTR, workspace.data_ptr()).finalize()
        execute, handle, plan = library().cudnnBackendExecute, self._handle, self._plan

        def call(kept=(self, pack, tensors, workspace)) -> None:
            _check(execute(handle, plan.pointer, pack.pointer), "cudnnBackendExecute")

        return call


def check_tensors(graph: Graph, tensors: dict[str, torch.Tensor]) -> None:
    """CudnnError unless there is one tensor for each named one, as the graph has it in memory: cuDNN is given
    the addresses alone."""
    for name in sorted(graph.named.keys() ^ tensors.keys()):
        raise CudnnError(f"tensor {name!r} is {'missing' if name in graph.named else 'not in the graph'}")
    for name, spec in graph.named.items():
        tensor = tensors[name]
        shape = tuple(tensor.shape) if tensor.dim() == 4 else (1, *tensor.shape, 1, 1)
        if (shape, tensor.dtype) != (spec.shape, spec.dtype):
            raise CudnnError(
                f"tensor {name!r} is {tensor.dtype} {shape}, the graph has {spec.dtype} {spec.shape}"
            )
        dense = tensor if tensor.dim() < 4 else tensor.permute(0, 2, 3, 1)
        if not dense.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
            raise CudnnError(f"tensor {name!r} is not channels_last or not aligned to {_ALIGNMENT} bytes")
