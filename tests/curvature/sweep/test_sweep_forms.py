"""Claim: networks, losses and batches of any form are swept right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.errors import UnsupportedModelError
from tests.support.cases import CASES
from tests.support.networks import NETWORKS, randomized
from tests.support.sweeping import (
    TwoLayers,
    assert_projections_agree,
    assert_sweep_agrees,
    layer_directions,
    swept,
    vectors,
)

# All of them together take seconds.


class _Detaching(TwoLayers):
    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x * torch.sigmoid(x.detach()))


class _WithoutGraph(TwoLayers):
    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            scale = self.second(torch.tanh(x)).exp().mean(1, keepdim=True)
        return self.second(torch.tanh(x) / scale)


@pytest.mark.parametrize("make", [_Detaching, _WithoutGraph])
def test_what_torch_takes_for_a_constant_has_no_tangent(make):
    assert_sweep_agrees(Objective(randomized(make().double()), vectors(4, 4, 3), witness=False))


@pytest.mark.check
def test_a_network_may_be_a_feature_extractor_without_graph_and_a_head():
    class Headed(TwoLayers):
        def forward(self, x):
            with torch.no_grad():
                x = torch.tanh(self.first(x))
            return self.second(x)

    objective = Objective(randomized(Headed().double()), vectors(4, 3))
    directions = layer_directions(objective)
    with pytest.raises(UnsupportedModelError, match="slope of the loss.*no_grad"):
        project_hessian(objective, {}, directions)
    # Along the head alone nothing is left out.
    project_hessian(objective, {}, {"second": directions["second"]})
    objective = Objective(randomized(Headed().double()), vectors(4, 3), witness=False)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    np.testing.assert_array_equal(found.curvature[0], 0)
    assert found.curvature[1, 1] > 1e-3


def test_unused_and_frozen_parameters_and_linear_directions():
    class Partly(TwoLayers):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            # Shifting all logits alike leaves the softmax as it is.
            return self.second(torch.tanh(self.first(x))) + self.shift

    model = randomized(Partly().double())
    model.first.requires_grad_(False)
    objective = Objective(model, vectors(4, 3))
    directions = layer_directions(objective)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    names = list(directions)
    assert abs(found.curvature[names.index("first"), names.index("first")]) > 1e-3
    np.testing.assert_array_equal(found.curvature[names.index("unused")], 0)
    np.testing.assert_allclose(found.curvature[names.index("shift")], 0, atol=1e-14)
    alone = swept(objective, [directions["unused"]])
    np.testing.assert_array_equal(alone.curvature, np.zeros((1, 1)))


def test_a_loss_without_curvature():
    objective = Objective(nn.Linear(5, 3).double(), vectors(4, 3), loss_fn=lambda out, _: out.mean())
    np.testing.assert_array_equal(swept(objective, layer_directions(objective)).curvature, np.zeros((3, 3)))


class _Several(TwoLayers):
    def forward(self, inputs):
        x = torch.tanh(self.first(inputs["x"]) * inputs["scale"][0])
        return {"logits": self.second(x), "features": x}


def test_dict_inputs_and_outputs():
    batches = [({"x": x, "scale": (x[:, :1].abs() + 0.5,)}, y) for x, y in vectors(4, 4, 3)]

    def loss(output, target):
        return F.cross_entropy(output["logits"], target) + output["features"].square().mean()

    objective = Objective(randomized(_Several().double()), batches, loss_fn=loss)
    assert_sweep_agrees(objective)


def test_tuple_outputs():
    class Pair(TwoLayers):
        def forward(self, x):
            features = torch.tanh(self.first(x))
            return self.second(features), features

    objective = Objective(
        randomized(Pair().double()), vectors(4, 3), loss_fn=lambda out, y: F.cross_entropy(out[0], y) + out[1].var()
    )
    assert_sweep_agrees(objective)


class _Scalar(TwoLayers):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().mean()


class _Constant(TwoLayers):
    def forward(self, x):
        return torch.tanh(self.second(self.first.bias)).expand(x.shape[0], -1)


class _EverySecond(TwoLayers):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))[::2]


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [
        (_Scalar, lambda out, _: 1.5 * out),
        (_Constant, F.cross_entropy),
        (_EverySecond, lambda out, y: F.cross_entropy(out, y[::2])),
    ],
)
def test_outputs_that_do_not_belong_to_examples(make, loss_fn):
    objective = Objective(randomized(make().double()), vectors(4, 3), loss_fn=loss_fn)
    directions = layer_directions(objective)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    assert np.abs(found.curvature[-1]).max() > 1e-3


class _Tokens(TwoLayers):
    """Gives more rows of output than it has examples."""

    def forward(self, x):
        return super().forward(torch.stack([x, x.flip(1), x * x], 1)).flatten(0, 1)


def test_an_output_may_have_more_rows_than_examples():
    net = randomized(_Tokens().double())
    objective = Objective(net, vectors(4, 3), loss_fn=_of_tokens)
    assert_sweep_agrees(objective)


def _of_tokens(output, target):
    return F.cross_entropy(output, target.repeat_interleave(3))


@pytest.mark.parametrize("target", [None, 3, torch.tensor(0.3)])
def test_targets_that_do_not_belong_to_examples(target):
    batches = [(x, target) for x, _ in vectors(4, 3)]

    def loss(output, target):
        return (output.sin() - (0 if target is None else target)).square().mean()

    assert_sweep_agrees(Objective(randomized(TwoLayers().double()), batches, loss_fn=loss))


def test_a_loss_of_the_whole_network():
    loss = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + model.first.weight.pow(4).sum())
    assert_sweep_agrees(Objective(randomized(TwoLayers().double()), vectors(4, 3), loss_fn=loss))


@pytest.mark.check
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in CASES])
def test_networks_that_are_easy_to_get_wrong(name):
    case = NETWORKS[name]
    assert_sweep_agrees(Objective(case.model(), case.batches((3, 2)), **case.options))


@pytest.mark.check
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases(case):
    objective = Objective(case.model(), case.batches((4, 4, 3)), **case.options)
    directions = layer_directions(objective, "tensor")
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
