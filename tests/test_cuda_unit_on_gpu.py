"""Whole units by the CUDA library on a GPU: the same to the bit as by its primitives one by one, and a training step as
one CUDA graph. On the emulator: test_cuda_unit.py."""

import pytest
import torch
from test_cuda_unit import DTYPES, UNITS
from test_residual_unit import unit
from test_whole_unit import check_same, results
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import whole_unit
from resnet_fused.primitives import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.unavailable("cuda") is not None, reason=str(dispatch.unavailable("cuda"))
)


@pytest.fixture(autouse=True)
def cuda_kernels_with_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    with rf.use_backend("cuda"):
        yield


def on_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cuda().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        items = [on_gpu(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", UNITS)
def test_same_as_by_primitives(case, training, dtype):
    check_same(on_gpu(unit(**UNITS[case], training=training, dtype=dtype)), slope=0.1)
    assert whole_unit.kept_operators() == (2, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_every_time(dtype):
    """Many blocks: which of them comes last, and merges, is left to chance."""
    arguments = on_gpu(
        unit("bottleneck", n=64, c=64, mid=16, h=32, w=32, dtype=dtype, parameters=torch.float32)
    )
    first = results(arguments)
    for _ in range(50):
        assert all(map(torch.equal, first, results(arguments)))


def test_a_training_step_as_one_graph(monkeypatch):
    """Three steps replayed are three steps taken: losses, parameters and running statistics."""
    # The stem's three channels are the library's, whose weight gradient may add in any order.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images = torch.randn(16, 3, 32, 32).cuda().contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,)).cuda()

    def make():
        torch.manual_seed(0)
        model = rf.models.create_model("preact_resnet29_cifar", 10).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step():
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return model, step

    plain, step = make()
    expected = [step().item() for _ in range(6)][3:]
    graphed, step = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(loss.item())
    assert found == expected
    for (name, a), b in zip(graphed.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
