"""The pool that large outputs of the CPU kernels come from (csrc/ops/pool.cpp)."""

import os
import subprocess
import sys

import pytest
import torch

import resnet_fused as rf

pytestmark = pytest.mark.usefixtures("cpu_library")

MB = 1 << 20


def stats():
    """used bytes, cached bytes, hits, misses"""
    return torch.ops.resnet_fused_cpu.pool_stats()


@pytest.fixture(autouse=True)
def empty_pool():
    torch.ops.resnet_fused_cpu.pool_clear()
    if stats()[0] == 0 and not _taken():
        pytest.skip("no pool: torch before 2.11, or RESNET_FUSED_CPU_POOL_MB=0")


def _taken():
    x = batch(1)
    before = stats()[0]
    y = normalized(x)
    return stats()[0] - before >= y.numel() * 4


def batch(megabytes, fill=1.0):
    x = torch.full((megabytes * MB // 4 // 64, 64, 1, 1), fill)
    return x.contiguous(memory_format=torch.channels_last)


def normalized(x):
    """x*3 + 1, in memory of the pool."""
    bn = torch.tensor([0.0, 1.0, 3.0, 1.0]).repeat_interleave(64).view(4, 64)
    return torch.ops.resnet_fused_cpu.bn_act_forward(x, bn, 0.0)


def test_memory_is_used_again():
    x = batch(3)
    y = normalized(x)
    address, (used, _, hits, misses) = y.data_ptr(), stats()
    assert used >= 3 * MB
    del y
    assert stats()[0] == used - 3 * MB and stats()[1] >= 3 * MB
    y = normalized(x)
    assert y.data_ptr() == address and stats()[2:] == (hits + 1, misses)
    other = normalized(x)
    assert other.data_ptr() != address and stats()[3] == misses + 1


def test_blocks_that_get_huge_pages():
    """Every block of 2 MB and more does, one at a time, once memory is reused more than it is mapped; nothing
    that is in use loses its values."""
    inputs = [batch(megabytes, megabytes + 0.5) for megabytes in (2, 3, 5)]
    kept = [normalized(x) for x in inputs]
    for _ in range(100):
        outputs = [normalized(x) for x in inputs]
        for x, y, other in zip(inputs, outputs, kept, strict=True):
            assert torch.equal(y, x * 3 + 1) and torch.equal(other, y)
        del outputs, y, other


def test_clear_gives_cached_memory_back():
    x = batch(4)
    kept, y = normalized(x), normalized(x)
    del y
    assert stats()[1] >= 4 * MB
    torch.ops.resnet_fused_cpu.pool_clear()
    assert stats()[1] == 0 and torch.equal(kept, x * 3 + 1)


def test_capacity():
    """RESNET_FUSED_CPU_POOL_MB bounds what is cached, not what is used; 0: no pool."""
    program = """
import torch, resnet_fused
from test_pool import batch, normalized, stats
x = batch(6)
many = [normalized(x) for _ in range(4)]
used = stats()[0]
del many
print(used >> 20, stats()[1] >> 20)
"""
    found_at = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(rf.__file__))]
    for capacity, expected in (("13", "24 12"), ("0", "0 0")):
        environment = {"PYTHONPATH": os.pathsep.join(found_at), "RESNET_FUSED_CPU_POOL_MB": capacity}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environment
        )
        assert done.stdout.strip() == expected, done.stderr
