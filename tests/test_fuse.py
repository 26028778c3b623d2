"""fuse(model): what it fuses, that it computes the same, and that the model stays the user's."""

import copy
import io
import pickle

import fuse_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(channels=6, size=8, dtype=torch.float64):
    return torch.randn(3, channels, size, size, dtype=dtype)


def convolutions(run):
    """How many convolutions ran in a fused operator."""
    with rf.record_dispatch() as log:
        run()
    return sum(record.primitive == "preact_conv_forward" for record in log)


# --- the units that users write ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", cases.UNITS)
def test_units_as_users_write_them(name, training):
    unit, equal, projecting = cases.UNITS[name]
    fused, plain = cases.pair_of(cases.net(unit))
    fused.train(training), plain.train(training)
    x = batch()
    cases.assert_same(fused, plain, x)
    expected = 3 * equal + projecting
    if name == "wide-dropout" and not training:
        expected = 3 * 2 + 3  # nothing is dropped: the pair around the dropout fuses too
    assert convolutions(lambda: fused(x)) == expected


@pytest.mark.parametrize("name", cases.UNITS)
def test_state_dict_identity_and_names(name):
    model = cases.net(cases.UNITS[name][0])
    parameters = {n: id(p) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    modules, text = [n for n, _ in model.named_modules()], repr(model)
    classes = [type(m) for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    assert rf.fuse(model) is model
    assert {n: id(p) for n, p in [*model.named_parameters(), *model.named_buffers()]} == parameters
    assert [n for n, _ in model.named_modules()] == modules and repr(model) == text
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert [type(m) for m in model.modules()] != classes
    assert rf.unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) and value.stride() == before[key].stride()
    again = io.BytesIO()
    torch.save(model.state_dict(), again)
    assert again.getvalue() == saved.getvalue()
