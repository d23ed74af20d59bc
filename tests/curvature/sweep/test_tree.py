"""Claim: data of any form come apart into tensors and what is around them, and are cut by their examples."""

import copy
import enum

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmc_curvature import BatchLoss, Objective, predict_barrier
from lmc_curvature.curvature.sweep import BatchTree
from lmc_curvature.errors import CaptureError
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, layer_directions, swept, vectors


def _data(rows=4):
    x = torch.arange(3.0 * rows).view(rows, 3)
    return {"x": x, "more": [(x[:, 0], "name"), torch.arange(3), torch.tensor(0.5)], "none": None}


def test_the_structure_may_be_filled_with_other_tensors():
    tree = BatchTree.of(_data())
    assert [tuple(tensor.shape) for tensor in tree.tensors] == [(4, 3), (4,), (3,), ()]
    rebuilt = tree.rebuilt([tensor + 1 for tensor in tree.tensors])
    assert rebuilt["more"][0][1] == "name"
    assert rebuilt["none"] is None
    assert torch.equal(rebuilt["x"], tree.tensors[0] + 1)
    assert torch.equal(rebuilt["more"][2], torch.tensor(1.5))


def test_the_signature_tells_shapes_types_and_values_but_not_numbers():
    signature = BatchTree.of(_data()).signature
    assert BatchTree.of({**_data(), "x": torch.ones(4, 3)}).signature == signature
    others = [
        {**_data(), "x": torch.ones(4, 3, dtype=torch.float64)},
        {**_data(), "x": torch.ones(5, 3)},
        {**_data(), "none": 0},
        {**_data(), "none": torch.ones(1)},
    ]
    assert len({signature, *(BatchTree.of(other).signature for other in others)}) == 5


def test_the_values_beside_tensors_are_told_alone():
    shapes, values = BatchTree.of((torch.ones(2), "a", {"b": 1.5})).signature
    assert "float32" in shapes
    assert values == repr((..., "a", {"b": 1.5}))


class _Sized(float):
    """A number that looks like any other of its class."""

    def __repr__(self):
        return "number"


class _Name(str):
    __slots__ = ()

    def __repr__(self):
        return "name"


class _Count(int):
    def __repr__(self):
        return "count"


@pytest.mark.parametrize("value", [_Sized(2), _Name("a"), _Count(3), {_Name("a"): 1.0}, [(_Count(3),)]])
def test_a_value_that_may_look_like_another_is_refused(value):
    with pytest.raises(CaptureError, match="the batch holds a _(Sized|Name|Count), which may change from batch to"):
        _ = BatchTree.of((torch.ones(2), value)).signature


class _Hiding(list):
    __hash__ = None

    def __repr__(self):
        return "list"


class _Task(enum.IntEnum):
    A = 1
    B = 2

    def __repr__(self):
        return "task"


class _Other(enum.IntEnum):
    A = 1


def _with(value):
    x = torch.ones(2)
    x.k = value
    return x


def test_whatever_differs_has_another_signature():
    values = [
        1, 1.0, True, "1", b"1", 1 + 0j, None, "None", 0.1, 0.1 + 2e-17, -0.0, 0.0, np.float64(1), np.str_("1"),
        _Task.A, _Task.B, _Other.A, [1], (1,), [[1]], [1, 1], {1: 1}, {"1": 1}, _Hiding([1]), _Hiding([2]),
        "torch.float32 (2,)", torch.ones(2), torch.ones(3), _with(1), _with(2), _with("1"), _with({"a": 1}),
    ]  # fmt: skip
    assert len({BatchTree.of((value,)).signature for value in values}) == len(values)
    for value in values:
        assert BatchTree.of((value,)).signature == BatchTree.of((copy.deepcopy(value),)).signature


def test_an_attribute_of_a_tensor_that_may_be_anything_is_refused():
    with pytest.raises(CaptureError, match="the batch holds a object, which"):
        _ = BatchTree.of([_with(object())]).signature
    with pytest.raises(CaptureError, match="the batch holds a Tensor, an attribute of a tensor, which may change"):
        _ = BatchTree.of([_with({"a": torch.ones(2)})]).signature


class _Scaled(dict):
    """A batch with values of its own beside its items."""

    def __init__(self, items, **attributes):
        super().__init__(items)
        vars(self).update(attributes)


def test_values_beside_the_items_of_a_batch_are_told():
    x = torch.ones(2)
    batches = [
        _Scaled({"x": x}, scale=1.0),
        _Scaled({"x": x}, scale=2.0),
        _Scaled({"x": x}, scale=[1.0]),
        _Scaled({"x": x}, _scale=1.0),
        _Scaled({"x": x}),
    ]
    assert len({BatchTree.of(batch).signature for batch in batches}) == len(batches)
    same = _Scaled({"x": torch.zeros(2)}, scale=1.0)
    assert BatchTree.of(same).signature == BatchTree.of(batches[0]).signature


def test_what_may_be_anything_beside_the_items_of_a_batch_is_refused_unless_private():
    x = torch.ones(2)
    for wrong in ({"task": object()}, {"_x": torch.ones(2)}, {"_both": [object(), torch.ones(2)]}):
        with pytest.raises(CaptureError, match="the batch holds a"):
            _ = BatchTree.of(_Scaled({"x": x}, **wrong)).signature
    private = BatchTree.of(_Scaled({"x": x}, _made_by=object(), _data={"x": x})).signature
    assert BatchTree.of(_Scaled({"x": x}, _made_by=object(), _data={"x": x})).signature == private


def test_batches_with_a_value_of_their_own_have_their_own_graphs():
    torch.manual_seed(0)
    pair = [randomized(torch.nn.Linear(3, 2), seed).double() for seed in (0, 1)]
    batches = [
        _Scaled({"x": torch.randn(4, 3, dtype=torch.float64), "y": torch.randint(2, (4,))}, scale=scale)
        for scale in (0.5, 2.0, 1.0)
    ]
    loss = BatchLoss(lambda network, batch: F.cross_entropy(network(batch["x"]), batch["y"]) * batch.scale)
    by_sweep, by_products = (
        predict_barrier(*pair, batches, loss_fn=loss, method=method, progress=False) for method in ("sweep", "hvp")
    )
    assert by_sweep.curve([0.5]) == pytest.approx(by_products.curve([0.5]), rel=1e-9)
    direct = sum(float(loss.fn(pair[0], batch).detach()) for batch in batches) / len(batches)
    assert by_sweep.loss_at(np.zeros((1, 2))) == pytest.approx(direct, rel=1e-9)


def test_rows_are_those_of_the_tensors_that_have_one_for_every_example():
    part = BatchTree.of(_data()).rows(1, 3, 4)
    assert [tuple(tensor.shape) for tensor in part.tensors] == [(2, 3), (2,), (3,), ()]
    assert torch.equal(part.structure["x"], _data()["x"][1:3])


def test_all_rows_are_the_data_themselves():
    tree = BatchTree.of(_data())
    assert tree.rows(0, 4, 4) is tree


def test_examples_are_chosen_by_number():
    tree = BatchTree.of(_data(5)).chosen(torch.tensor([0, 1, 0, 1, 0]), 5)
    assert torch.equal(tree.structure["x"], _data(5)["x"][[0, 1, 0, 1, 0]])
    assert torch.equal(tree.structure["more"][1], torch.arange(3))


def test_images_have_their_channels_last():
    image, row = BatchTree.of((torch.ones(2, 3, 4, 4), torch.ones(2, 3))).laid_out().tensors
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert row.is_contiguous()


def test_a_value_that_may_be_anything_is_refused():
    class Kind:
        pass

    class Ignoring(TwoLayers):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs[0])))

    objective = Objective(randomized(Ignoring().double()), [((x, Kind()), y) for x, y in vectors(4)])
    with pytest.raises(CaptureError, match="the batch holds a Kind, which may change from batch to batch"):
        swept(objective, layer_directions(objective))
