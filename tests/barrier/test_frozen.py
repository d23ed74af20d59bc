"""Claim: with layers frozen, barriers are those of the others, between two networks that share the frozen ones."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective, Segment, measure_barrier, predict_barrier
from lmc_curvature.barrier import predict_on_segment
from lmc_curvature.errors import ArchitectureMismatchError, UnsupportedModelError
from lmc_curvature.landscapes import QuadraticProduct, landscape_loss, origin
from tests.support.cases import CASES
from tests.support.networks import untouched

CONV = CASES["conv, interpolate"]
ALPHAS = np.linspace(0, 1, 5)
MEASURE = {"alphas": ALPHAS, "metrics": ("loss",), "progress": False}


def _landscape(position):
    """f(θ) = ½ (θ − m)ᵀ A (θ − m) with three layers of sizes 1, 2 and 1."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    minimum = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    return QuadraticProduct(
        minimum,
        hessians=(root @ root.T)[None],
        position=torch.tensor(position, dtype=torch.float64),
        layers={"first": 1, "second": 2, "third": 1},
    )


@pytest.mark.parametrize("base", ["a", "b"])
def test_of_a_quadratic_both_are_the_closed_form(base):
    ends = _landscape([1.0, -2.0, 0.5, 3.0]), _landscape([-1.0, 0.3, 2.0, 1.0])
    common = {"loss_fn": landscape_loss, "frozen": ["first", "third"], "base": base, "layers": "tensor"}
    with untouched(*ends):
        predicted = predict_barrier(*ends, origin(4), **common, progress=False)
        measured = measure_barrier(*ends, origin(4), **common, sets="each", **MEASURE)
    first, second = (end.position().detach() for end in ends)
    fixed = first if base == "a" else second
    moved = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    ends_of_segment = [fixed + moved * (position - fixed) for position in (first, second)]
    losses = []
    for position in ends_of_segment:
        (value,) = _landscape(position.tolist())(torch.zeros(1, 4, dtype=torch.float64)).tolist()
        losses.append(value)
    delta = ends_of_segment[1] - ends_of_segment[0]
    energy = float(delta @ ends[0].hessians[0] @ delta)
    # A quadratic lies below its chord by α(1−α)/2 ΔᵀAΔ.
    np.testing.assert_allclose(measured.curve(), -ALPHAS * (1 - ALPHAS) / 2 * energy, atol=1e-12)
    np.testing.assert_allclose(measured.layer_curves()[0], measured.curve(), atol=1e-12)
    np.testing.assert_allclose(
        predicted.curve(ALPHAS, None, "second-order"), ALPHAS * (1 - ALPHAS) / 2 * energy, atol=1e-12
    )
    np.testing.assert_allclose(predicted.curve(ALPHAS, None, "hermite"), measured.curve(), atol=1e-12)
    assert predicted.layers == ("second",)
    assert [end.loss for end in predicted.endpoints] == pytest.approx(losses, rel=1e-12)
    assert measured.ends() == pytest.approx(losses, rel=1e-12)
    assert predicted.distance == pytest.approx(float(delta.norm()))
    other = "b" if base == "a" else "a"
    note = f"frozen at model_{base}: first, third (2 entries, 2 of which are others in model_{other})"
    assert predicted.notes == measured.notes == (note,)
    assert note in str(predicted)
    assert note in str(measured)


def _by_hand(a, b, alpha, moves, base):
    """The network with its moved entries at alpha and the others at the base, made of plain modules."""
    model = copy.deepcopy(a if base == "a" else b)
    states = a.state_dict(), b.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and moves(name):
                tensor.copy_((1 - alpha) * states[0][name] + alpha * states[1][name])
    return model


@pytest.mark.check(after=1)
@pytest.mark.parametrize("base", ["a", "b"])
@pytest.mark.parametrize(
    ("frozen", "moves"),
    [
        ("fc", lambda name: "fc" not in name),
        (["conv1"], lambda name: "1." not in name),
        ([r"conv1", r"^bn2\.w"], lambda name: "1." not in name and "bn2.w" not in name),
    ],
)
@pytest.mark.parametrize("policy", ["interpolate", "batch"])
def test_networks_are_measured_as_by_hand(base, frozen, moves, policy):
    a, b = CONV.model(0), CONV.model(1)
    x, y = CONV.batches((8,))[0]
    found = measure_barrier(a, b, [(x, y)], frozen=frozen, base=base, batch_norm=policy, **MEASURE)
    values = [
        F.cross_entropy(_by_hand(a, b, alpha, moves, base).train(policy == "batch")(x), y).item() for alpha in ALPHAS
    ]
    np.testing.assert_allclose(found.values(), values, atol=1e-12)
    np.testing.assert_allclose(found.ends(), [values[0], values[-1]], atol=1e-12)
    predicted = predict_barrier(a, b, [(x, y)], frozen=frozen, base=base, batch_norm=policy, progress=False)
    np.testing.assert_allclose([end.loss for end in predicted.endpoints], [values[0], values[-1]], atol=1e-12)


def test_the_statistics_estimated_again_are_those_of_the_shared_layers():
    a, b = CONV.model(0), CONV.model(1)
    batches = CONV.batches((6, 6))
    found = measure_barrier(a, b, batches, frozen="conv1", base="b", batch_norm="recalibrate", **MEASURE)
    values = []
    for alpha in ALPHAS:
        model = _by_hand(a, b, alpha, lambda name: "1." not in name, "b")
        torch.optim.swa_utils.update_bn([x for x, _ in batches], model)
        model.eval()
        with torch.no_grad():
            values.append(np.mean([F.cross_entropy(model(x), y).item() for x, y in batches]))
    np.testing.assert_allclose(found.values(), values, atol=1e-12)


@pytest.mark.check
@pytest.mark.parametrize("base", ["a", "b"])
def test_curvature_is_that_of_the_layers_that_move(base):
    a, b = CONV.model(0), CONV.model(1)
    found = predict_barrier(a, b, CONV.batches(), frozen="conv1", base=base, progress=False)
    # The same two networks made by hand, of which all is moved: the frozen layer does not.
    ends = [_by_hand(a, b, alpha, lambda name: "1." not in name, base) for alpha in (0, 1)]
    whole = predict_barrier(*ends, CONV.batches(), progress=False)
    assert whole.layers == ("conv1", "conv2", "fc")
    assert found.layers == ("conv2", "fc")
    for mine, theirs in zip(found.endpoints, whole.endpoints, strict=True):
        np.testing.assert_allclose(mine.curvature, theirs.curvature[1:, 1:], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(mine.slopes, theirs.slopes[1:], rtol=1e-9, atol=1e-12)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-12)
    assert found.barrier() == pytest.approx(whole.barrier(), rel=1e-9)


def test_a_backbone_without_gradients_is_left_alone():
    a, b = CONV.model(0), CONV.model(1)
    for network in (a, b):
        network.requires_grad_(False)
        network.fc.requires_grad_(True)
    options = {"frozen": "requires_grad", "layers": {"head": ["fc"]}}
    predicted = predict_barrier(a, b, CONV.batches(), **options, progress=False)
    assert predicted.layers == ("head",)
    assert predicted.notes == (
        "frozen at model_a: what does not require gradients (10 entries, 6 of which are others in model_b)",
    )
    measured = measure_barrier(a, b, CONV.batches(), **options, **MEASURE)
    head_alone = measure_barrier(a, b, CONV.batches(), sets=[["fc"]], **MEASURE)
    between = _by_hand(a, b, 0.5, lambda name: "fc" in name, "a").eval()
    x, y = (torch.cat(parts) for parts in zip(*CONV.batches(), strict=True))
    assert measured.values()[2] == pytest.approx(F.cross_entropy(between(x), y).item())
    assert measured.values()[0] == pytest.approx(head_alone.ends()[0])
    # A linear layer under cross-entropy: no barrier above the chord, whatever lies before it.
    assert measured.barrier() <= 1e-12


@pytest.mark.check
def test_a_segment_of_ones_own_tells_the_prediction_what_is_frozen():
    a, b = CONV.model(0), CONV.model(1)
    segment = Segment(a, b, frozen="fc", base="b")
    found = predict_on_segment(Objective(a, CONV.batches()), segment, progress=False)
    expected = predict_barrier(a, b, CONV.batches(), frozen="fc", base="b", progress=False)
    assert found.notes == expected.notes == segment.notes
    np.testing.assert_array_equal(found.endpoints[1].curvature, expected.endpoints[1].curvature)


COMPUTE = {
    "predict": lambda *args, **options: predict_barrier(*args, **options, progress=False),
    "measure": lambda *args, **options: measure_barrier(*args, **options, alphas=3, progress=False),
}
compute = pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)


@compute
@pytest.mark.filterwarnings("ignore")
def test_networks_in_which_nothing_can_move_are_refused(compute):
    def make():
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)

    for networks in ((make(), make()), (nn.ReLU(), nn.ReLU())):
        with pytest.raises(UnsupportedModelError, match="Nothing can move between the two networks.*no parameters"):
            compute(*networks, [(torch.randn(9, 4), torch.arange(9) % 3)])


@pytest.mark.check
@compute
def test_networks_that_differ_in_what_is_frozen_alone_are_equal(compute):
    model = CONV.model()
    other = copy.deepcopy(model)
    other.fc = CONV.model(1).fc
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute(model, other, CONV.batches())
    with pytest.warns(UserWarning, match="equal in every entry that moves.*is the same file given twice"):
        found = compute(model, other, CONV.batches(), frozen="fc")
    assert found.notes == (
        "frozen at model_a: fc (2 entries, 2 of which are others in model_b)",
        "model_a and model_b are equal in every entry that moves",
    )


@compute
def test_frozen_parts_are_compared_like_all_others(compute):
    a, b = (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(slope), nn.Linear(4, 3)) for slope in (0.1, 0.3))
    with pytest.raises(ArchitectureMismatchError, match="1.negative_slope: 0.1 in model_a, 0.3 in model_b"):
        compute(a, b, iter([(torch.randn(9, 4), torch.arange(9) % 3)]), frozen="0")
