"""Claim: a measurement is the networks in between, evaluated plainly, for the whole and for sets of layers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lmc_curvature import BarrierMeasurement, BatchLoss, measure_barrier
from lmc_curvature.errors import LoaderError, NonFiniteError, OptionError, PartitionError
from tests.support.cases import CASES
from tests.support.networks import in_float32
from tests.support.notes import check_notes

CONV = CASES["conv, interpolate"]


@pytest.fixture(scope="module")
def measurement():
    return measure_barrier(
        CONV.model(0), CONV.model(1), CONV.batches(), sets=[["conv1"], {"fc", "conv2"}], alphas=5, progress=False
    )


def _mixed(alpha, names):
    """A plain copy of the first network with the named entries moved to alpha."""
    model, other = CONV.model(0), CONV.model(1).state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and any(name.startswith(prefix) for prefix in names):
                tensor.copy_((1 - alpha) * tensor + alpha * other[name])
    return model


def _loss_and_error(model, batches=None):
    x, y = (torch.cat(parts) for parts in zip(*(batches or CONV.batches()), strict=True))
    with torch.no_grad():
        out = model.eval()(x)
    return F.cross_entropy(out, y).item(), (out.argmax(1) != y).double().mean().item()


EVERY = ("conv1", "bn1", "conv2", "bn2", "fc")


def test_the_curve_is_the_networks_in_between(measurement):
    for index, metric in enumerate(("loss", "error")):
        values = np.array([_loss_and_error(_mixed(alpha, EVERY))[index] for alpha in measurement.alphas])
        chord = (1 - measurement.alphas) * values[0] + measurement.alphas * values[-1]
        np.testing.assert_allclose(measurement.values(metric), values, atol=1e-12)
        np.testing.assert_allclose(measurement.curve(metric), values - chord, atol=1e-12)
        assert measurement.barrier(metric) == measurement.curve(metric).max()
        assert measurement.ends(metric) == pytest.approx((values[0], values[-1]))


@pytest.mark.parametrize(("index", "moved"), [(0, ("conv1", "bn1")), (1, ("conv2", "bn2", "fc"))])
def test_a_set_moves_from_either_end(measurement, index, moved):
    rest = tuple(name for name in EVERY if name not in moved)
    first, second = _loss_and_error(_mixed(0, EVERY))[0], _loss_and_error(_mixed(1, EVERY))[0]
    for alpha, found in zip(measurement.alphas, measurement.layer_curves()[index], strict=True):
        from_first = _loss_and_error(_mixed(alpha, moved))[0]
        # From the second end the rest stays there, and the set is where it was.
        model = _mixed(1, rest)
        with torch.no_grad():
            for name, tensor in _mixed(alpha, moved).state_dict().items():
                if any(name.startswith(prefix) for prefix in moved):
                    model.state_dict()[name].copy_(tensor)
        from_second = _loss_and_error(model)[0]
        expected = (1 - alpha) * from_first + alpha * from_second - ((1 - alpha) * first + alpha * second)
        assert found == pytest.approx(expected, abs=1e-12)


def test_both_sides_of_a_set_are_kept(measurement):
    for index, moved in enumerate((("conv1", "bn1"), ("conv2", "bn2", "fc"))):
        rest = tuple(name for name in EVERY if name not in moved)
        for number, metric in enumerate(measurement.metrics):
            near, far = measurement.sides(metric)[index, 2]
            assert near == pytest.approx(_loss_and_error(_mixed(0.5, moved))[number], abs=1e-12)
            model = _mixed(1, rest)
            for name, tensor in _mixed(0.5, moved).state_dict().items():
                if name.startswith(moved):
                    model.state_dict()[name].copy_(tensor)
            assert far == pytest.approx(_loss_and_error(model)[number], abs=1e-12)
            chord = sum(measurement.ends(metric)) / 2
            assert (near + far) / 2 - chord == pytest.approx(measurement.layer_curves(metric)[index, 2], abs=1e-12)


def test_any_point_of_the_cube_may_be_measured(tmp_path):
    points = [{"fc": 1, "conv1": 0.25, "conv2": 0.7}, dict.fromkeys(("conv1", "conv2", "fc"), 0.5)]
    options = {"alphas": [0.5], "progress": False}
    found = measure_barrier(CONV.model(0), CONV.model(1), CONV.batches(), points=points, **options)
    model = CONV.model(0)
    with torch.no_grad():
        for moved, alpha in ((("conv1", "bn1"), 0.25), (("conv2", "bn2"), 0.7), (("fc",), 1)):
            for name, tensor in _mixed(alpha, moved).state_dict().items():
                if name.startswith(moved):
                    model.state_dict()[name].copy_(tensor)
    for number, metric in enumerate(found.metrics):
        first, second = found.rises(metric)
        ends = sum(found.ends(metric)) / 2
        assert first == pytest.approx(_loss_and_error(model)[number] - ends, abs=1e-12)
        assert second == pytest.approx(found.curve(metric)[0], abs=1e-12)
        assert found.rise_errors(metric)[1] == pytest.approx(found.standard_error(metric))
    assert found.points == ({"conv1": 0.25, "conv2": 0.7, "fc": 1.0}, dict.fromkeys(("conv1", "conv2", "fc"), 0.5))
    found.save(tmp_path / "measured")
    again = BarrierMeasurement.load(tmp_path / "measured")
    assert again.points == found.points
    np.testing.assert_array_equal(again.rises(), found.rises())


def test_sets_are_named_and_a_partition_measures_each_layer(measurement):
    assert measurement.sets == (("conv1",), ("conv2", "fc"))
    assert measurement.layers == ("conv1", "conv2 + fc")
    each = measure_barrier(CONV.model(0), CONV.model(1), CONV.batches(), sets="each", alphas=5, progress=False)
    assert each.layers == ("conv1", "conv2", "fc")
    np.testing.assert_allclose(each.layer_curves()[0], measurement.layer_curves()[0], atol=1e-12)
    np.testing.assert_array_equal(each.layer_barriers(), each.layer_curves().max(axis=1))


def test_sets_may_name_the_layers_of_another_partition():
    found = measure_barrier(
        CONV.model(0), CONV.model(1), CONV.batches(), layers="module", sets=[["bn1"]], alphas=3, progress=False
    )
    assert found.sets == (("bn1",),)


def test_all_layers_as_a_set_is_the_whole_curve():
    found = measure_barrier(
        CONV.model(0), CONV.model(1), CONV.batches(), sets=[["conv1", "conv2", "fc"]], alphas=5, progress=False
    )
    np.testing.assert_allclose(found.layer_curves()[0], found.curve(), atol=1e-14)


def test_how_the_data_come_does_not_matter(measurement):
    batches = CONV.batches()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for loader in ((b for b in batches), DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), [(x, y)]):
        again = measure_barrier(CONV.model(0), CONV.model(1), loader, sets=[["conv1"]], alphas=5, progress=False)
        np.testing.assert_allclose(again.curve(), measurement.curve(), atol=1e-12)
        np.testing.assert_allclose(again.layer_curves()[0], measurement.layer_curves()[0], atol=1e-12)


def test_batch_policy_normalises_by_the_batch():
    found = measure_barrier(
        CONV.model(0), CONV.model(1), CONV.batches((8,)), alphas=3, batch_norm="batch", progress=False
    )
    x, y = CONV.batches((8,))[0]
    values = [F.cross_entropy(_mixed(alpha, EVERY).train()(x), y).item() for alpha in (0, 0.5, 1)]
    np.testing.assert_allclose(found.values(), values, atol=1e-12)


def test_recalibrate_reestimates_at_every_point():
    batches = CONV.batches((6, 6))
    found = measure_barrier(
        CONV.model(0), CONV.model(1), batches, sets=[["conv1"]], alphas=3, batch_norm="recalibrate", progress=False
    )
    values = []
    for alpha in (0, 0.5, 1):
        model = _mixed(alpha, EVERY)
        torch.optim.swa_utils.update_bn([x for x, _ in batches], model)
        values.append(_loss_and_error(model, batches)[0])
    np.testing.assert_allclose(found.values(), values, atol=1e-12)
    half = _mixed(0.5, ("conv1", "bn1"))
    torch.optim.swa_utils.update_bn([x for x, _ in batches], half)
    # Under this policy statistics are not part of the state, so only weights moved.
    assert _loss_and_error(half, batches)[0] != pytest.approx(values[1])
    with pytest.raises(LoaderError, match="visits the loader twice.*pass a list or a DataLoader"):
        measure_barrier(CONV.model(0), CONV.model(1), iter(batches), batch_norm="recalibrate", progress=False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_network_is_measured_and_left_alone(case):
    models = case.model(0), case.model(1)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    found = measure_barrier(
        *models,
        case.batches(),
        **case.options,
        alphas=3,
        layers="module",
        sets="each",
        metrics=("loss",),
        progress=False,
    )
    assert np.isfinite(found.layer_barriers()).all()
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_where_the_curve_is_nowhere_above_the_chord_the_error_is_that_of_the_middle():
    # Ends on either side of the optimum; that no batch has a barrier at an end says nothing about other data.
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    batches = list(zip(x.split(8), (x.sum(1, keepdim=True) + torch.randn(40, 1).double()).split(8), strict=True))
    models = [torch.nn.Linear(3, 1, bias=False).double() for _ in range(2)]
    for model, weight in zip(models, (0.0, 2.0), strict=True):
        torch.nn.init.constant_(model.weight, weight)
    options = {"loss_fn": torch.nn.functional.mse_loss, "metrics": ("loss",), "progress": False}
    found = measure_barrier(*models, batches, alphas=5, sets=[["weight"]], layers="tensor", **options)
    middle = [measure_barrier(*models, [batch], alphas=5, **options).curve()[2] for batch in batches]
    expected = np.std(middle, ddof=1) / np.sqrt(5)
    assert (found.barrier(), found.layer_barriers()[0]) == (0, 0)
    assert found.standard_error() == pytest.approx(expected)
    assert found.layer_standard_errors()[0] == pytest.approx(expected)
    assert f"loss   0 ± {expected:.2g} (nowhere above the chord)" in str(found)


def test_a_curve_that_is_the_chord_but_for_rounding_is_the_chord():
    # At every step one more of ten examples is wrong: 0.1, 0.2, …, which differ from their chord by up to 6e-17.
    x = torch.arange(10.0, dtype=torch.float64)[:, None] + 0.5
    models = [torch.nn.Linear(1, 1).double() for _ in range(2)]
    for model, bias in zip(models, (-1.0, -7.0), strict=True):
        torch.nn.init.constant_(model.weight, 1.0)
        torch.nn.init.constant_(model.bias, bias)
    batches = [(x[rows], torch.ones(len(rows), 1, dtype=torch.float64)) for rows in torch.arange(10).split(3)]
    loss_fn = torch.nn.functional.binary_cross_entropy_with_logits
    found = measure_barrier(*models, batches, loss_fn=loss_fn, alphas=7, metrics=("error",), progress=False)
    assert found.ends("error") == pytest.approx([0.1, 0.7])
    assert found.curve("error").tolist() == [0] * 7
    middle = found.curve_errors("error")[0, 3]
    assert found.standard_error("error") == pytest.approx(middle)


def test_standard_error_is_that_of_the_batches():
    found = measure_barrier(CONV.model(0), CONV.model(1), CONV.batches((5,) * 6), alphas=5, progress=False)
    at = found.curve().argmax() or 2
    curves = [
        measure_barrier(CONV.model(0), CONV.model(1), [batch], alphas=5, progress=False).curve()[at]
        for batch in CONV.batches((5,) * 6)
    ]
    assert found.standard_error() == pytest.approx(np.std(curves, ddof=1) / np.sqrt(6))


def test_saving_and_loading_is_lossless(measurement, tmp_path):
    measurement.save(tmp_path / "measurement.safetensors")
    again = BarrierMeasurement.load(tmp_path / "measurement.safetensors")
    for name in ("alphas", "batch_sizes", "batch_ends", "batch_values"):
        np.testing.assert_array_equal(getattr(again, name), getattr(measurement, name))
    for name in ("sets", "metrics", "batch_norm", "loss"):
        assert getattr(again, name) == getattr(measurement, name)
    assert again.loss == "cross_entropy"
    assert str(again) == str(measurement)


def test_text_says_that_one_batch_does_not_tell_an_error(measurement):
    place = "at alpha" if measurement.barrier() else r"(nowhere above the chord)"
    assert f"{measurement.barrier():.4g} ± {measurement.standard_error():.2g} {place}" in str(measurement)
    text = str(measure_barrier(CONV.model(0), CONV.model(1), CONV.batches((1,)), progress=False))
    assert text.startswith("Barrier measured on 1 example, ")
    assert ("nan" in text, text.count("± unknown (one batch)")) == (False, text.count("±"))
    assert "±" in text


def test_notes_are_kept_and_files_without_them_are_read(measurement, tmp_path):
    check_notes(measurement, "barrier-measurement", tmp_path)


@pytest.mark.check
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
def test_equal_networks_have_no_barrier_and_are_said_to_be_equal(policy):
    model, batches = CONV.model().float(), in_float32(CONV.batches((7, 6, 5)))
    with pytest.warns(UserWarning, match="model_a and model_b are equal in every entry that moves, .*same file"):
        found = measure_barrier(model, copy.deepcopy(model), batches, sets="each", batch_norm=policy, progress=False)
    for metric in found.metrics:
        assert not found.curve(metric).any()
        assert not found.layer_curves(metric).any()
        assert found.standard_error(metric) == 0
    assert found.notes == ("model_a and model_b are equal in every entry that moves",)
    assert str(found).endswith(f"\n  {found.notes[0]}")


def test_error_is_measured_for_soft_and_dense_targets():
    x, y = CONV.batches((8,))[0]
    soft = measure_barrier(CONV.model(0), CONV.model(1), [(x, F.one_hot(y, 3).double())], alphas=3, progress=False)
    hard = measure_barrier(CONV.model(0), CONV.model(1), [(x, y)], alphas=3, progress=False)
    np.testing.assert_allclose(soft.values("error"), hard.values("error"))

    pixels = nn.Conv2d(2, 3, 1).double(), nn.Conv2d(2, 3, 1).double()
    target = torch.randint(3, (8, 5, 5), generator=torch.Generator().manual_seed(0))
    dense = measure_barrier(*pixels, [(x, target)], alphas=3, progress=False)
    expected = (pixels[0](x).argmax(1) != target).double().mean().item()
    assert dense.ends("error")[0] == pytest.approx(expected)


def test_dataframe_has_a_row_a_measured_set(measurement):
    frame = measurement.to_dataframe()
    assert list(frame["layers"]) == list(measurement.layers)
    assert list(frame["set"]) == list(measurement.sets)
    for metric in measurement.metrics:
        np.testing.assert_array_equal(frame[f"{metric}_barrier"], measurement.layer_barriers(metric))
    # The set of all layers has the whole network's standard error.
    models = CONV.model(0), CONV.model(1)
    whole = measure_barrier(*models, CONV.batches(), sets=[["conv1", "conv2", "fc"]], alphas=5, progress=False)
    for metric in whole.metrics:
        assert whole.to_dataframe()[f"{metric}_barrier_se"][0] == pytest.approx(whole.standard_error(metric))
    without = measure_barrier(*models, CONV.batches(), alphas=3, progress=False).to_dataframe()
    assert len(without) == 0
    assert list(without.columns) == list(frame.columns)


def test_alphas_may_be_any_positions():
    found = measure_barrier(CONV.model(0), CONV.model(1), CONV.batches(), alphas=[0.75, 0.25], progress=False)
    assert found.alphas.tolist() == [0.25, 0.75]
    whole = measure_barrier(CONV.model(0), CONV.model(1), CONV.batches(), alphas=5, progress=False)
    np.testing.assert_allclose(found.curve(), whole.curve()[[1, 3]], atol=1e-13)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alphas": 2}, OptionError, "alphas=2: at least 3"),
        ({"alphas": [0.5, -0.1]}, OptionError, r"alpha=-0.1 lies outside the segment; expected numbers in \[0, 1\]"),
        ({"sets": [["conv1"], ["conv9"]]}, PartitionError, "no layer 'conv9': did you mean 'conv"),
        ({"sets": [["conv1"], []]}, OptionError, r"sets\[1\] is an empty set"),
        ({"sets": "fused"}, OptionError, "sets='fused': expected 'each', or a list of sets"),
        ({"sets": None}, OptionError, "sets=None: expected 'each', or a list of sets"),
        ({"sets": [0]}, OptionError, r"sets=\[0\]: expected 'each', or a list of sets"),
        ({"points": [[0.5] * 3]}, OptionError, r"points\[0\]=\[.*: expected a mapping from every layer to a number"),
        ({"points": [{"conv1": 0.5, "fc": 1}]}, PartitionError, r"points\[0\] has no number for layer 'conv2'"),
        ({"points": [{"conv9": 0.5}]}, PartitionError, "no layer 'conv9'"),
        ({"points": [{"conv1": 2, "conv2": 0, "fc": 0}]}, OptionError, r"points\[0\]\['conv1'\]=2 lies outside"),
        ({"layers": [["conv1"]]}, OptionError, r"layers is the partition, and .* are now sets=\[\['conv1'\]\]"),
        ({"layers": None}, OptionError, r"layers=None: layers is the partition, and .* are now sets=\(\)"),
        ({"partition": "module"}, OptionError, "partition='module' is now layers='module'.*sets="),
        ({"allow_tf32": 1}, OptionError, "allow_tf32=1: expected True or False"),
        ({"metrics": ("accuracy",)}, OptionError, "metrics='accuracy' is not a choice"),
        ({"metrics": ()}, OptionError, "No metric was asked for"),
        ({"loss_fn": BatchLoss(lambda m, b: m(b[0]).mean())}, OptionError, r"pass metrics=\('loss',\)"),
        ({"loss_fn": F.mse_loss}, OptionError, r"'error' needs a loss_fn.*batch 0.*Pass metrics=\('loss',\)"),
    ],
)
def test_bad_input_is_named(options, error, message, untyped):
    case = CASES["tied weights"] if options.get("loss_fn") is F.mse_loss else CONV
    x = torch.zeros(2, 6, dtype=torch.float64)
    loader = [(x, x[:, :1].expand(2, 6))] if case is not CONV else CONV.batches()
    if case is not CONV:
        options = {**options, "loss_fn": lambda out, target: F.mse_loss(out[:, :1], target[:, :1])}
        loader = [(x, x[:, :1])]
    with pytest.raises(error, match=message):
        measure_barrier(case.model(0), case.model(1), loader, progress=False, **options)


def test_a_point_where_the_loss_is_not_finite_is_named():
    first, second = nn.Linear(1, 2).double(), nn.Linear(1, 2).double()
    for layer, value in ((first, -1.0), (second, 3.0)):
        nn.init.constant_(layer.weight, value)
        nn.init.constant_(layer.bias, 0.0)
    data = [(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long))]
    options = {"metrics": ("loss",), "loss_fn": lambda out, _: (1 / out**2).mean(), "layers": "tensor", "alphas": [0.5]}
    with pytest.raises(NonFiniteError, match=r"loss is inf .* at alpha=\{'weight': 0.25, 'bias': 0.5\}"):
        measure_barrier(first, second, data, points=[{"weight": 0.25, "bias": 0.5}], progress=False, **options)


def test_layer_barriers_need_sets():
    found = measure_barrier(CONV.model(0), CONV.model(1), CONV.batches(), alphas=3, progress=False)
    with pytest.raises(OptionError, match="pass sets='each' or .* to measure_barrier"):
        found.layer_barriers()
    with pytest.raises(OptionError, match="metric='acc' is not a choice"):
        found.curve("acc")


def test_a_loss_that_is_not_finite_names_point_and_batch():
    batches = CONV.batches()
    batches[2][0][0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"loss is nan at batch 2 \(3 examples\), at model_a"):
        measure_barrier(CONV.model(0), CONV.model(1), batches, progress=False)

    a, b = nn.Linear(1, 2, bias=False).double(), nn.Linear(1, 2, bias=False).double()
    nn.init.constant_(a.weight, -1.0)
    nn.init.constant_(b.weight, 1.0)
    data = [(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(NonFiniteError, match=r"loss is inf at batch 0.*alpha=0.5 \(all layers moved from model_a\)"):
        measure_barrier(
            a, b, data, alphas=5, loss_fn=lambda out, _: (1 / out**2).mean(), metrics=("loss",), progress=False
        )
