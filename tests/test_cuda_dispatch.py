"""When the CUDA kernels are chosen, and why not. The tensors need not exist: choosing is pure."""

import re
from types import SimpleNamespace

import pytest
import torch

import resnet_fused as rf
from resnet_fused import cuda_kernels, triton_kernels
from resnet_fused.ops.whole_unit import UnitShapes, _Choices
from resnet_fused.primitives import dispatch, tuning
from resnet_fused.primitives.dispatch import ConvGeometry

CONVOLUTIONS = ("preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad")
NARROW = ConvGeometry((128, 64, 32, 32), (16, 64, 1, 1), (1, 1), (0, 0), (1, 1), 1)
WIDE = ConvGeometry((256, 512, 28, 28), (512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1)


@pytest.fixture
def library(monkeypatch):
    """As if the CUDA library were loaded, without Triton; the operators are stand-ins that say who ran."""
    monkeypatch.setattr(dispatch, "_OWN", {"cpu": ("cpu",), "cuda": ("cuda",)})

    def stand_in(name):
        return lambda *args: f"cuda {name}"

    for name, implementations in dispatch._implementations.items():
        monkeypatch.setitem(implementations, "cuda", stand_in(name))
    monkeypatch.setattr(cuda_kernels, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_kernels, "tf32_allowed", lambda: True)


def test_auto_takes_them_where_fusing_should_pay(library):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for primitive in CONVOLUTIONS:
            assert dispatch.choose(primitive, "cuda", dtype, NARROW) == ("cuda", "cuda kernel")
            choice = dispatch.choose(primitive, "cuda", dtype, WIDE)
            assert choice.backend == "unfused" and "nothing is measured" in choice.reason
            with rf.use_backend("cuda"):
                assert dispatch.choose(primitive, "cuda", dtype, WIDE).backend == "cuda"
            with rf.use_backend("unfused"):
                assert dispatch.choose(primitive, "cuda", dtype, NARROW).backend == "unfused"
        for primitive in ("channel_stats", "preact_apply", "residual_add", "bn_act_forward"):
            assert dispatch.choose(primitive, "cuda", dtype).backend == "cuda"


@pytest.mark.parametrize(
    ("dtype", "change", "reason"),
    [
        (torch.float64, {}, "do not take torch.float64"),
        (torch.bfloat16, {"groups": 2}, "do not take groups=2"),
        (torch.bfloat16, {"weight": (16, 64, 5, 5)}, "do not take 5x5 kernels"),
        (torch.bfloat16, {"weight": (16, 64, 1, 3)}, "do not take 1x3 kernels"),
        (torch.bfloat16, {"stride": (3, 1)}, r"do not take stride \(3, 1\)"),
        (torch.bfloat16, {"weight": (17, 64, 1, 1)}, "64 and 17 channels are not multiples of 8"),
        (torch.bfloat16, {"weight": (8192, 64, 1, 1)}, "more than 4096 channels"),
        (torch.bfloat16, {"input": (2**15, 64, 256, 256)}, "count pixels in 32 bits"),
    ],
)
def test_what_is_declined_goes_the_unfused_way(library, dtype, change, reason):
    geometry = NARROW._replace(**change)
    for name in ("auto", "cuda"):
        with rf.use_backend(name):
            choice = dispatch.choose("preact_conv_forward", "cuda", dtype, geometry)
        assert choice.backend == "unfused"
        assert re.search(reason, choice.reason)


def units_of(name, batch, size):
    """(input's shape, UnitShapes) of every unit of a net."""
    for _, unit in rf.models.create_model(name).residual_units():
        convolutions = [m for n, m in unit.named_children() if isinstance(m, torch.nn.Conv2d) and n != "shortcut"]
        lists = (
            [n for m in convolutions for n in pairs(m)]
            for pairs in (lambda m: m.stride, lambda m: m.padding, lambda m: m.dilation)
        )
        shape = (batch, convolutions[0].in_channels, size, size)
        projection = unit.shortcut
        yield (
            shape,
            UnitShapes(
                [m.weight.shape for m in convolutions], [None if projection is None else projection.weight.shape],
                *lists, [1] * len(convolutions), (1, 1) if projection is None else projection.stride,
                [len(convolutions)],
            ),
        )  # fmt: skip
        for m in convolutions:
            size = (size + 2 * m.padding[0] - m.kernel_size[0]) // m.stride[0] + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["preact_resnet164_cifar", "preact_resnet1001_cifar"])
def test_units_of_small_convolutions_are_of_one_backend(library, name, dtype):
    """Or none of them would be one call: their convolutions take less time than a launch."""
    for shape, units in set_of(units_of(name, 128, 32)):
        for both_ways in (False, True):
            x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape)
            choices = _Choices(x, units)
            choices.small("channel_stats", "finalize_forward", "finalize_backward", "preact_apply")
            for geometry in filter(None, (*choices.convolutions, *choices.shortcuts)):
                choices.backward(geometry, True, True) if both_ways else choices.forward(geometry)
            assert choices.backends == {"cuda"}, (shape, units)


def set_of(units):
    return {str(unit): unit for unit in units}.values()


@pytest.mark.parametrize(("name", "batch", "size"), [("wrn28_10_cifar", 128, 32), ("preact_resnet50", 256, 56)])
def test_large_3x3_convolutions_are_the_librarys(library, name, batch, size):
    for shape, units in set_of(units_of(name, batch, size)):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=shape)
        for geometry in _Choices(x, units).convolutions:
            # A net's first unit reads 16 channels: less arithmetic than memory.
            if geometry.weight[2] == 3 and geometry.stride == (1, 1) and geometry.weight[1] >= 64:
                for primitive in CONVOLUTIONS:
                    assert dispatch.choose(primitive, "cuda", torch.bfloat16, geometry).backend == "unfused"


@pytest.mark.parametrize("limits", [((7, 5), 65536), ((7, 0), None)], ids=str)
def test_devices_that_are_too_old(library, monkeypatch, limits):
    monkeypatch.setattr(cuda_kernels, "device_limits", lambda: limits)
    for dtype in (torch.float32, torch.bfloat16):
        for primitive, geometry in (("preact_conv_forward", NARROW), ("channel_stats", None)):
            choice = dispatch.choose(primitive, "cuda", dtype, geometry)
            assert choice.backend != "cuda" and "need compute capability 8.0" in choice.reason


def test_limits_are_those_of_the_weakest_device(monkeypatch):
    devices = [
        SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=1),
        SimpleNamespace(major=8, minor=9, shared_memory_per_multiprocessor=102400),
    ]
    limits = cuda_kernels.device_limits.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert limits() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: devices[i])
    assert limits() == ((8, 9), 101376)
    del devices[1]
    assert limits() == ((9, 0), 232448)
    devices.append(SimpleNamespace(major=8, minor=0))
    assert limits() == ((8, 0), None)


def test_devices_with_little_shared_memory(library, monkeypatch):
    """99 KB for a block: sm_86, sm_89, sm_120."""
    monkeypatch.setattr(cuda_kernels, "device_limits", lambda: ((8, 9), 101376))
    wide = NARROW._replace(weight=(128, 64, 3, 3), padding=(1, 1))
    with rf.use_backend("cuda"):
        for dtype, primitive, geometry in (
            (torch.bfloat16, "preact_conv_forward", wide._replace(input=(8, 128, 9, 9), weight=(128, 128, 3, 3))),
            (torch.bfloat16, "preact_conv_dgrad", wide._replace(input=(8, 128, 9, 9), weight=(128, 128, 3, 3))),
            (torch.bfloat16, "preact_conv_forward", NARROW._replace(input=(8, 512, 9, 9), weight=(128, 512, 1, 1))),
            (torch.float32, "preact_conv_backward_1x1", NARROW),
        ):
            choice = dispatch.choose(primitive, "cuda", dtype, geometry)
            assert choice.backend == "unfused" and "bytes of shared memory" in choice.reason
        for primitive in (*CONVOLUTIONS, "preact_conv_backward_1x1"):
            assert dispatch.choose(primitive, "cuda", torch.bfloat16, NARROW).backend == "cuda"
        assert dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, wide).backend == "cuda"


def test_then_triton_then_unfused(library, monkeypatch, tmp_path):
    """What the CUDA kernels decline, or are expected to be slower at, goes to the Triton kernels if these take it."""
    monkeypatch.setattr(dispatch, "_OWN", {"cuda": ("cuda", "triton")})
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: None)
    monkeypatch.setattr(triton_kernels, "declines_device", lambda kind: None)
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    odd = NARROW._replace(weight=(17, 64, 1, 1))
    choice = dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, odd)
    assert choice == ("triton", "triton kernel; 64 and 17 channels are not multiples of 8")
    between = ConvGeometry((256, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, between).backend == "triton"
    assert dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, NARROW).backend == "cuda"
    wide = dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, WIDE)
    assert wide.backend == "unfused" and "the triton kernel is expected to be slower" in wide.reason
    name = tuning.convolution_name("preact_conv_forward", torch.bfloat16, WIDE)
    tuning.store({}, {name: False})
    assert dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, WIDE).backend == "triton"
    grouped = dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, NARROW._replace(groups=2))
    assert grouped.backend == "unfused"
    assert grouped.reason == "the cuda kernels do not take groups=2; the triton kernels do not take groups=2"


def test_both_gradients_in_one_kernel(library):
    def choose(**change):
        geometry = NARROW._replace(**change)
        return dispatch.choose("preact_conv_backward_1x1", "cuda", torch.bfloat16, geometry)

    assert choose() == ("cuda", "cuda kernel")
    for change in ({"weight": (72, 64, 1, 1)}, {"stride": (2, 2)}, {"weight": (16, 64, 3, 3)}):
        assert choose(**change).backend == "unfused"


def test_float32_only_as_tf32(library, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "tf32_allowed", lambda: False)
    choice = dispatch.choose("preact_conv_forward", "cuda", torch.float32, NARROW)
    assert choice.backend == "unfused" and "TF32" in choice.reason
    assert dispatch.choose("channel_stats", "cuda", torch.float32).backend == "cuda"
    assert dispatch.choose("preact_conv_forward", "cuda", torch.bfloat16, NARROW).backend == "cuda"


@pytest.mark.skipif(not cuda_kernels.extension.cuda_loaded(), reason="the CUDA library is not loaded")
def test_a_kept_choice_follows_the_precision(monkeypatch):
    calls = []
    operator = cuda_kernels.implementation("preact_conv_forward", lambda x, *args: calls.append("unfused"))
    x = torch.ones(1, 8, 2, 2)
    arguments = (x, None, torch.ones(8, 8, 1, 1), None, None, 0.0, [1, 1], [0, 0], [1, 1], 1, False)
    monkeypatch.setattr(cuda_kernels, "tf32_allowed", lambda: False)
    operator(*arguments)
    assert calls == ["unfused"]
    monkeypatch.setattr(cuda_kernels, "tf32_allowed", lambda: True)
    with pytest.raises((NotImplementedError, RuntimeError)):  # the operator itself, which has no CPU kernel
        operator(*arguments)


def test_every_primitive_has_an_operator():
    if not cuda_kernels.extension.cuda_loaded():
        pytest.skip("the CUDA library is not loaded")
    pools = ("bn_act_pool", "max_pool")
    in_triton_alone = {f"{pool}_{way}" for pool in pools for way in ("forward", "backward")}  # docs/design.md
    for primitive, implementations in dispatch._implementations.items():
        if primitive in in_triton_alone:
            assert "cuda" not in implementations
        elif "cpu" in implementations:
            assert "cuda" in implementations, primitive
            libraries = torch.ops.resnet_fused_cpu, torch.ops.resnet_fused_cuda
            schemas = [str(getattr(library, primitive).default._schema) for library in libraries]
            assert schemas[0].partition("::")[2] == schemas[1].partition("::")[2]


def test_on_cpu_tensors_it_raises(library):
    with (
        rf.use_backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' was asked for, but the tensors are on cpu"),
    ):
        dispatch.choose("channel_stats", "cpu", torch.float32)
