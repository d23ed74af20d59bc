"""Claim: a captured graph is made once, and used for nothing but what it was captured of."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import nms

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.projection import project_hessian_at
from lmc_curvature.curvature.projection.by_sweep import project_by_sweep
from lmc_curvature.errors import CaptureError, FallbackWarning
from tests.support.cases import CASES
from tests.support.networks import Watched, randomized
from tests.support.sweeping import (
    TwoLayers,
    assert_projections_agree,
    assert_sweep_agrees,
    compiled_batches,
    layer_directions,
    posed,
    swept,
    vectors,
)


class _Scaled(TwoLayers):
    """Has a buffer that no segment moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64), persistent=True)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * self.scale)


class _ByNumpy(TwoLayers):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * float(np.abs(x.numpy()).mean())


class _Squeezing(TwoLayers):
    """Loses the axis of the examples where there is one."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))[:, None].squeeze()


def _assert_as_products(objective, state=None, **options):
    directions = layer_directions(objective)
    found = project_hessian(objective, state or {}, directions, **options)
    assert_projections_agree(found, project_hessian(objective, state or {}, directions, method="hvp"), relative=1e-9)
    return found


class _ByText(TwoLayers):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * float(re.findall(r"-?\d+\.\d+", str(x))[0])


class _ByPython(TwoLayers):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x.clone().apply_(abs))))


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("network", "name"), [(_ByNumpy, "numpy"), (_ByText, "__repr__"), (_ByPython, "apply_")])
def test_what_leaves_torch_is_no_constant(network, name):
    objective = Objective(randomized(network().double()), vectors(4, 4, 4))
    with pytest.raises(CaptureError, match=rf"Tensor\.{name} hands values out of torch.*in forward: return self"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")
    with pytest.warns(FallbackWarning, match="hands values out of torch"):
        _assert_as_products(objective)


@pytest.mark.parametrize("complete_first", [True, False])
def test_entries_that_do_not_move_belong_to_the_state(complete_first):
    model = randomized(_Scaled().double())
    objective = Objective(model, vectors(4, 3))
    other = {**model.state_dict(), "scale": torch.tensor(3.0, dtype=torch.float64)}
    states = [other, {}] if complete_first else [{}, other]
    curvatures = [_assert_as_products(objective, state, method="sweep").curvature for state in states]
    assert not np.allclose(*curvatures, rtol=0.1)
    directions = layer_directions(objective)
    for found, expected in zip(project_hessian_at(objective, states, directions), curvatures, strict=True):
        np.testing.assert_allclose(found.curvature, expected, rtol=1e-9, atol=1e-12)


def test_running_statistics_may_be_given_or_not():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    objective = Objective(randomized(model), vectors(6), batch_norm="batch")
    for state in (model.state_dict(), {}):
        _assert_as_products(objective, state, method="sweep")


def test_a_loss_that_has_changed_since_is_captured_anew():
    temperature = [1.0]
    objective = Objective(
        randomized(TwoLayers().double()),
        vectors(4, 4),
        loss_fn=lambda output, target: F.cross_entropy(output / temperature[0], target),
    )
    before = _assert_as_products(objective, method="sweep").curvature
    temperature[0] = 3.0
    assert not np.allclose(_assert_as_products(objective, method="sweep").curvature, before, rtol=0.1)


def test_autocast_is_part_of_what_was_captured():
    model, batches = randomized(TwoLayers()), [(x.float(), y) for x, y in vectors(8)]
    objective = Objective(model, batches)
    directions = layer_directions(objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = project_hessian(objective, {}, directions, method="sweep").curvature
    exact = project_hessian(Objective(model, batches), {}, directions).curvature
    assert not np.allclose(coarse, exact, rtol=1e-4)
    np.testing.assert_allclose(coarse, exact, atol=0.05 * np.abs(exact).max())
    np.testing.assert_array_equal(project_hessian(objective, {}, directions).curvature, exact)


def test_tiles_whose_outputs_cannot_be_joined_are_swept_whole():
    objective = Objective(randomized(_Squeezing().double()), vectors(5))
    assert_sweep_agrees(objective, tiling=Tiling(2, 99, keeps_values=True))


class _Named(TwoLayers):
    """Takes a string beside its inputs, or nothing but a string."""

    def forward(self, named):
        x, name = named
        if x is None:
            x = torch.ones(4, self.first.in_features, dtype=torch.float64)
        return self.second(torch.tanh((1.0 if name < "b" else 2.0) * self.first(x)))


class _OneOrTheOther(TwoLayers):
    """Does something else with the second of its inputs than with the first."""

    def forward(self, pair):
        first, second = pair
        return self.second(torch.tanh(self.first(first) if second is None else 2 * self.first(second)))


class _Masking(TwoLayers):
    """Never chooses its last class."""

    def forward(self, x):
        output = self.second(torch.tanh(self.first(x)))
        return output.masked_fill(torch.arange(output.shape[1]) == output.shape[1] - 1, -torch.inf)


def _named(model, batches):
    return Objective(randomized(model.double()), batches)


def test_strings_in_a_batch_are_part_of_what_is_captured():
    batches = [((x, name), y) for (x, y), name in zip(vectors(4, 4, 4, 4), "abab", strict=True)]
    objective = _named(_Named(), batches)
    _assert_as_products(objective, method="sweep")
    first, second, *others = compiled_batches(objective, layer_directions(objective))
    assert first is not second
    assert others == [first, second]


def test_a_tensor_in_another_place_is_another_batch():
    batches = []
    for index, ((x, y),) in enumerate(vectors(size) for size in (4, 4, 4, 4)):
        batches.append((((x, None) if index % 2 else (None, x)), y))
    objective = _named(_OneOrTheOther(), batches)
    _assert_as_products(objective, method="sweep")
    first, second, *others = compiled_batches(objective, layer_directions(objective))
    assert first is not second
    assert others == [first, second]


class _Factor(float):
    """A number that looks like any other of its class."""

    def __repr__(self):
        return "factor"


class _Times(TwoLayers):
    """Takes a number beside its inputs."""

    def forward(self, pair):
        x, factor = pair
        return self.second(torch.tanh(factor * self.first(x)))


def test_numbers_that_look_alike_end_in_a_fallback():
    batches = [((x, _Factor(1 + i)), y) for i, (x, y) in enumerate(vectors(4, 4, 4))]
    with pytest.warns(FallbackWarning, match="the batch holds a _Factor, which may change"):
        found = _assert_as_products(_named(_Times(), batches))
    plain = [((x, float(factor)), y) for (x, factor), y in batches]
    assert_projections_agree(found, _assert_as_products(_named(_Times(), plain), method="sweep"), relative=1e-9)


class _ByAttribute(TwoLayers):
    """Reads a number from its inputs."""

    def forward(self, x):
        return self.second(torch.tanh(getattr(x, "factor", 1.0) * self.first(x)))


def _attributed(*factors):
    batches = vectors(*(20 for _ in factors))
    for (x, _), factor in zip(batches, factors, strict=True):
        x.factor = factor
    return batches


@pytest.mark.check
@pytest.mark.parametrize("tiling", [None, Tiling(6, 99, keeps_values=True)])
def test_attributes_of_tensors_are_part_of_what_is_captured(tiling):
    batches = _attributed(1.0, 2.0, 1.0, 3.0)
    found = assert_sweep_agrees(_named(_ByAttribute(), batches), tiling=tiling)
    plain = [((x, x.factor), y) for x, y in batches]
    assert_projections_agree(found, _assert_as_products(_named(_Times(), plain), method="hvp"), relative=1e-9)


def test_attributes_that_may_be_anything_end_in_a_fallback():
    batches = _attributed(*(torch.tensor(float(factor), dtype=torch.float64) for factor in (1, 2, 3)))
    with pytest.warns(FallbackWarning, match="the batch holds a Tensor, an attribute of a tensor, which may change"):
        found = _assert_as_products(_named(_ByAttribute(), batches))
    plain = [((x, x.factor.item()), y) for x, y in batches]
    assert_projections_agree(found, _assert_as_products(_named(_Times(), plain), method="hvp"), relative=1e-9)


@pytest.mark.check
def test_strings_that_never_come_again_end_in_a_fallback():
    batches = [((x, f"image-{i}.png"), y) for i, (x, y) in enumerate(vectors(*[4] * 36))]
    objective = _named(_Named(), batches)
    with pytest.raises(CaptureError, match=r"captured as a graph 32 times.* change: .*image-32\.png.*image-31\.png"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")
    with pytest.warns(FallbackWarning, match="Leave out what the loss does not need"):
        _assert_as_products(objective)


def test_inputs_without_a_tensor_are_swept():
    batches = [((None, "a"), y) for _, y in vectors(4, 4)]
    _assert_as_products(_named(_Named(), batches), method="sweep")


def test_infinite_outputs_are_what_was_captured():
    objective = Objective(randomized(_Masking().double()), [(x, y.clamp(max=1)) for x, y in vectors(4, 4)])
    _assert_as_products(objective, method="sweep")
    before = compiled_batches(objective, layer_directions(objective))
    _assert_as_products(objective, method="sweep")
    assert compiled_batches(objective, layer_directions(objective)) == before


@pytest.mark.check
def test_graphs_are_captured_once_for_each_shape():
    case = CASES["conv, interpolate"]
    network = Watched(case.model())
    objective = Objective(network, case.batches((4, 4, 3, 4, 3)))
    directions = layer_directions(objective)
    swept(objective, directions)
    assert sorted(network.sizes("capture")) == [3, 4]
    of_four, again, of_three, *others = compiled_batches(objective, directions)
    assert of_four is again
    assert others == [of_four, of_three]
    swept(objective, layer_directions(objective, seed=1))
    swept(objective, directions, case.model(3).state_dict(prefix="network."))
    assert compiled_batches(objective, directions) == [of_four, of_four, of_three, of_four, of_three]
    # Entries that do not move are constants of the plan.
    bias = [{"network.fc.bias": torch.ones(3)}]
    swept(objective, bias)
    assert not {*compiled_batches(objective, bias)} & {of_four, of_three}
    assert sorted(network.sizes("capture")) == [3, 3, 4, 4]


@pytest.mark.check
def test_several_states_share_their_graphs():
    case = CASES["conv, interpolate"]
    network = Watched(case.model())
    objective = Objective(network, case.batches((4, 4)))
    directions = layer_directions(objective)
    states = [case.model(seed).state_dict(prefix="network.") for seed in (0, 3)]
    together = project_hessian_at(objective, states, directions, method="sweep")
    assert network.sizes("capture") == [4]
    for state, projection in zip(states, together, strict=True):
        expected = project_hessian(objective, state, directions, method="hvp")
        assert_projections_agree(projection, expected, relative=1e-9)


def test_graphs_are_compared_with_the_network_once_in_every_pass():
    network = Watched(randomized(TwoLayers().double()))
    objective = Objective(network, vectors(4, 4, 4))
    directions = layer_directions(objective)
    swept(objective, directions)
    for _ in range(2):
        network.calls.clear()
        swept(objective, directions)
        assert network.calls == [("value", 4)]


@pytest.mark.check
def test_graphs_go_with_their_objective():
    case = CASES["conv, interpolate"]
    objective = Objective(case.model(), case.batches((3,)))
    directions = layer_directions(objective)
    swept(objective, directions)
    (compiled,) = compiled_batches(objective, directions)
    network = weakref.ref(compiled.networks[3])
    del compiled
    assert network() is not None
    del objective
    gc.collect()
    assert network() is None


@pytest.mark.check
def test_graphs_of_shapes_that_were_not_seen_for_long_are_given_up():
    objective = Objective(randomized(TwoLayers().double()), vectors(3, 4))
    directions = layer_directions(objective)
    swept(objective, directions)
    of_three = weakref.ref(compiled_batches(objective, directions)[0])
    for number in range(10_000):
        objective.memo(number, lambda: None)
    gc.collect()
    assert of_three() is None
    assert_sweep_agrees(objective)


@pytest.mark.check
def test_graphs_that_do_not_hold_any_more_are_given_up():
    temperature = [1.0]
    objective = Objective(
        randomized(TwoLayers().double()),
        vectors(4),
        loss_fn=lambda output, target: F.cross_entropy(output / temperature[0], target),
    )
    directions = layer_directions(objective)
    swept(objective, directions)
    before = weakref.ref(compiled_batches(objective, directions)[0])
    temperature[0] = 2.0
    swept(objective, directions)
    gc.collect()
    assert before() is None


@pytest.mark.check
def test_folded_weights_are_kept_for_one_shape_of_batch_at_a_time():
    objective = Objective(randomized(TwoLayers().double()), vectors(3, 4, 5))
    directions = layer_directions(objective)
    problem = posed(objective, directions)
    kept = []

    def nothing():
        pytest.fail("nothing is kept for the state")

    with objective.one_pass() as batches:
        for batch in batches:
            project_by_sweep(problem, problem.points[0], batch)
            _, preludes = problem.points[0].memo("preludes", nothing)
            kept += map(weakref.ref, preludes.values())
    gc.collect()
    assert [reference() is None for reference in kept] == [True, True, False]


def _kept_by_nms(model, batch):
    x, y, boxes = batch
    # The number is read off the shape, and the shape may be all that is used.
    return F.cross_entropy(model(x), y, reduction="sum") / nms(boxes, boxes[:, 0], 0.3)[1:].shape[0]


def _entries_of_a_sparse_tensor(model, batch):
    x, y, boxes = batch
    return F.cross_entropy(model(x), y, reduction="sum") / (boxes > 0.5).double().to_sparse().indices().shape[1]


@torch.library.custom_op("lmc_tests::count", mutates_args=())
def _count(x: torch.Tensor) -> int:
    return int((x > 0.5).sum())


def _number_of_an_operation(model, batch):
    x, y, boxes = batch
    return F.cross_entropy(model(x), y, reduction="sum") / _count(boxes)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_kept_by_nms, "captured as a graph for other values: torchvision.nms.default.*in nms: "),
        (_entries_of_a_sparse_tensor, "to_sparse.default has a sparse result.*in _entries_of_a_sparse_tensor: "),
        (_number_of_an_operation, "lmc_tests.count.default hands a number out.*in _number_of_an_operation: "),
    ],
)
def test_shapes_that_values_decide_are_never_those_of_another_batch(loss, message):
    generator = torch.Generator().manual_seed(0)

    def batch(x, y):
        corners = torch.rand(len(x), 2, generator=generator, dtype=torch.float64)
        return x, y, torch.cat([corners, corners + 0.6], 1)

    batches = [batch(*pair) for pair in vectors(8, 8, 8)]
    objective = Objective(randomized(TwoLayers().double()), batches, loss_fn=BatchLoss(loss, size=lambda _: 8))
    directions = layer_directions(objective)
    expected = project_hessian(objective, {}, directions, method="hvp")
    with pytest.warns(FallbackWarning, match=message):
        assert_projections_agree(project_hessian(objective, {}, directions), expected, relative=1e-9)
