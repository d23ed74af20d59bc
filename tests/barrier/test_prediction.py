"""Claim: a prediction is a function of its projections, does not depend on how data come, and survives the disk."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lmc_curvature import (
    BarrierPrediction,
    HessianOperator,
    Objective,
    Segment,
    measure_barrier,
    predict_barrier,
)
from lmc_curvature.barrier import EXPANSIONS
from lmc_curvature.errors import (
    ArchitectureMismatchError,
    FileFormatError,
    LoaderError,
    NonFiniteError,
    OptionError,
    PartitionError,
)
from lmc_curvature.geometry import distance
from tests.support.cases import CASES
from tests.support.notes import check_notes

CONV = CASES["conv, interpolate"]
ALPHAS = np.linspace(0, 1, 9)


@pytest.fixture(scope="module")
def prediction():
    return predict_barrier(CONV.model(0), CONV.model(1), CONV.batches(), progress=False)


@pytest.mark.check
def test_full_curve_is_proposition_1_with_the_whole_hessians(prediction):
    models = CONV.model(0), CONV.model(1)
    segment = Segment(*models)
    delta = {name: tensor for direction in segment.directions().values() for name, tensor in direction.items()}
    energies = []
    for model in models:
        H = HessianOperator(Objective(model, CONV.batches()))
        v = H.flatten({name: delta[name] for name in H.state})
        energies.append(float(v @ H.to_dense() @ v))
    expected = ALPHAS * (1 - ALPHAS) / 2 * (ALPHAS * energies[0] + (1 - ALPHAS) * energies[1])
    np.testing.assert_allclose(prediction.curve(ALPHAS, None, "second-order"), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.check
def test_layer_curve_is_proposition_2_with_the_layer_block(prediction):
    models = CONV.model(0), CONV.model(1)
    direction = Segment(*models).directions()["conv2"]
    energies = []
    for model in models:
        block = HessianOperator(Objective(model, CONV.batches()), layers="conv2")
        v = block.flatten({name: direction[name] for name in block.columns})
        energies.append(float(v @ block.to_dense() @ v))
    expected = ALPHAS * (1 - ALPHAS) / 2 * (ALPHAS * energies[0] + (1 - ALPHAS) * energies[1])
    np.testing.assert_allclose(prediction.curve(ALPHAS, ["conv2"], "second-order"), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(prediction.curve(ALPHAS, "conv2", "second-order"), expected, rtol=1e-9, atol=1e-12)


def test_summaries_follow_from_the_curves(prediction):
    fine = np.linspace(0, 1, 2001)
    assert prediction.barrier() == pytest.approx(prediction.curve(fine).max(), rel=1e-5, abs=1e-12)
    for expansion in ("second-order", "with-slopes", "shared-hessian"):
        expected = [prediction.barrier([name], expansion) for name in prediction.layers]
        np.testing.assert_array_equal(prediction.layer_barriers(expansion), expected)
    half = prediction.curve([0.5], None, "shared-hessian")[0]
    assert prediction.interactions.sum() == pytest.approx(half, rel=1e-12)
    first, second = (np.diag(projection.curvature) for projection in prediction.endpoints)
    np.testing.assert_allclose(prediction.hessian_energy, (first + second) / 2)


def test_distances_are_norms_of_the_directions_over_parameters(prediction):
    model = CONV.model(0)
    parameters = dict(model.named_parameters())
    directions = Segment(model, CONV.model(1)).directions()
    moved = [[t for name, t in directions[layer].items() if name in parameters] for layer in prediction.layers]
    expected = [np.sqrt(sum(float((t**2).sum()) for t in tensors)) for tensors in moved]
    np.testing.assert_allclose(prediction.distances, expected)
    assert sum(map(len, moved)) < sum(map(len, directions.values())), "running statistics move, too"
    # That of the two networks as the user knows them.
    assert prediction.distance == pytest.approx(distance(parameters, dict(CONV.model(1).named_parameters())))


def _same(a, b, tolerance):
    np.testing.assert_allclose(
        a.curve(ALPHAS, None, "with-slopes"), b.curve(ALPHAS, None, "with-slopes"), atol=tolerance
    )
    np.testing.assert_allclose(a.endpoints[0].curvature, b.endpoints[0].curvature, atol=tolerance)
    np.testing.assert_allclose(a.endpoints[1].slopes, b.endpoints[1].slopes, atol=tolerance)
    assert a.endpoints[1].loss == pytest.approx(b.endpoints[1].loss, abs=tolerance)


@pytest.mark.check
def test_how_the_data_come_does_not_matter(prediction):
    batches = CONV.batches()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loaders = {
        "generator": (batch for batch in batches),
        "shuffled": DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True),
        "another batch size, last batch short": DataLoader(TensorDataset(x, y), batch_size=4),
        "one batch": [(x, y)],
    }
    for loader in loaders.values():
        _same(prediction, predict_barrier(CONV.model(0), CONV.model(1), loader, progress=False), 1e-10)


@pytest.mark.check
def test_float32_agrees_with_float64(prediction):
    models = CONV.model(0).float(), CONV.model(1).float()
    single = predict_barrier(*models, CONV.batches(), progress=False)
    _same(prediction, single, 2e-5 * np.abs(prediction.endpoints[0].curvature).max())
    double = predict_barrier(*models, CONV.batches(), dtype=torch.float64, progress=False)
    _same(prediction, double, 2e-6 * np.abs(prediction.endpoints[0].curvature).max())


@pytest.mark.check
def test_max_batches_uses_the_first_ones():
    models = CONV.model(0), CONV.model(1)
    some = predict_barrier(*models, CONV.batches(), max_batches=2, progress=False)
    assert some.examples == 12
    _same(some, predict_barrier(*models, CONV.batches()[:2], progress=False), 1e-14)


@pytest.mark.check
def test_equal_networks_have_no_barrier_and_are_said_to_be_equal():
    model = CONV.model()
    with pytest.warns(UserWarning, match="model_a and model_b are equal in every entry that moves, .*same file"):
        nothing = predict_barrier(model, copy.deepcopy(model), CONV.batches(), progress=False)
    assert nothing.distance == 0
    for expansion in EXPANSIONS:
        assert not nothing.curve(ALPHAS, None, expansion).any()
        assert nothing.standard_error(None, expansion) == 0
    assert not nothing.layer_barriers().any()
    assert nothing.notes == ("model_a and model_b are equal in every entry that moves",)
    assert f"\n  {nothing.notes[0]}\n" in str(nothing)


@pytest.mark.check
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_network_and_policy_is_predicted_and_left_alone(case):
    models = case.model(0), case.model(1)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    found = predict_barrier(*models, case.batches(), **case.options, progress=False)
    assert np.isfinite(found.endpoints[0].curvature).all()
    assert len(found.layers) == len(found.distances) >= 2
    for model, state in zip(models, before, strict=True):
        assert model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.check
def test_it_is_computed_by_the_sweep(prediction):
    models = CONV.model(0), CONV.model(1)
    swept, by_products = (
        predict_barrier(*models, CONV.batches(), method=method, progress=False) for method in ("sweep", "hvp")
    )
    for number, end in enumerate(prediction.endpoints):
        np.testing.assert_array_equal(end.batch_curvatures, swept.endpoints[number].batch_curvatures)
        # The same numbers but for rounding, which tells the two methods apart.
        others = by_products.endpoints[number].batch_curvatures
        np.testing.assert_allclose(end.batch_curvatures, others, rtol=1e-9, atol=1e-12)
        assert (end.batch_curvatures != others).any()


def test_saving_and_loading_is_lossless(prediction, tmp_path):
    prediction.save(tmp_path / "deep" / "prediction.safetensors")
    again = BarrierPrediction.load(tmp_path / "deep" / "prediction.safetensors")
    assert (again.layers, again.batch_norm) == (prediction.layers, prediction.batch_norm)
    np.testing.assert_array_equal(again.distances, prediction.distances)
    for field in ("batch_sizes", "batch_losses", "batch_slopes", "batch_curvatures"):
        for a, b in zip(again.endpoints, prediction.endpoints, strict=True):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
            assert getattr(a, field).dtype == getattr(b, field).dtype
    assert str(again) == str(prediction)


@pytest.mark.check
def test_notes_are_kept_and_files_without_them_are_read(prediction, tmp_path):
    check_notes(prediction, "barrier-prediction", tmp_path)


def test_loading_something_else_is_refused(prediction, tmp_path):
    (tmp_path / "noise").write_bytes(b"not a safetensors file")
    with pytest.raises(FileFormatError, match="noise is damaged or is not a safetensors file"):
        BarrierPrediction.load(tmp_path / "noise")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        BarrierPrediction.load(tmp_path / "absent")


def test_dataframe_has_a_row_a_layer(prediction):
    frame = prediction.to_dataframe()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame["layer"]) == list(prediction.layers) == ["conv1", "conv2", "fc"]
    np.testing.assert_array_equal(frame["barrier"], prediction.layer_barriers())
    np.testing.assert_array_equal(frame["slope_b"], prediction.endpoints[1].slopes)
    assert frame["barrier_se"].notna().all()


@pytest.mark.check
def test_text_shows_the_barrier_and_its_error(prediction):
    text = str(prediction)
    second = prediction.barrier(None, "second-order"), prediction.standard_error(None, "second-order")
    place = prediction.position(None, "second-order")
    fine = np.linspace(0, 1, 1001)
    assert place == pytest.approx(fine[prediction.curve(fine, None, "second-order").argmax()], abs=2e-3)
    assert "  second-order       {:.4g} ± {:.2g} at α = {:.2g}\n".format(*second, place) in text
    middle = prediction.curve([0.5])[0]
    assert (prediction.barrier(), middle < 0) == (0, True), "nothing rises, and the sign is shown"
    assert f"  anchored           {middle:.4g} ± {prediction.standard_error():.2g} (nowhere above the chord" in text
    assert "\nVerdict: Yes" in text
    assert " The averaged network has a loss of " in text
    assert "15 examples, 3 layers" in text
    recalibrated = predict_barrier(
        CONV.model(0), CONV.model(1), CONV.batches(), batch_norm="recalibrate", progress=False
    )
    assert "differentiated through batch statistics" in str(recalibrated)


def test_text_says_that_one_batch_does_not_tell_an_error():
    one = predict_barrier(
        CONV.model(0), CONV.model(1), CONV.batches((1,)), layers={"all": [".*"]}, witness=False, progress=False
    )
    text = str(one)
    assert "1 example, 1 layer, anchors at 0, 0.5, 1, batch_norm=" in text
    assert "nan" not in text
    assert f"second-order       {one.barrier(None, 'second-order'):.4g} ± unknown (one batch) at α = " in text
    assert f"so the barrier there is {one.curve([0.5])[0]:.3g} ± unknown (one batch)" in text
    assert "± unknown (one batch)" in repr(one)


@pytest.mark.check
def test_progress_bars_are_shown_when_asked_and_silent_without_a_terminal(capsys):
    models = CONV.model(0), CONV.model(1)
    predict_barrier(*models, CONV.batches(), progress=True)
    measure_barrier(*models, CONV.batches(), alphas=3, progress=True)
    shown = capsys.readouterr().err
    assert "curvature:" in shown
    assert "measuring:" in shown
    predict_barrier(*models, CONV.batches())
    measure_barrier(*models, CONV.batches(), alphas=3)
    assert capsys.readouterr().err == ""


def test_questions_that_have_no_answer_are_refused(prediction, untyped):
    with pytest.raises(PartitionError, match="no layer 'conv3': did you mean 'conv"):
        prediction.curve([0.5], ["conv1", "conv3"])
    with pytest.raises(OptionError, match="alpha=1.5 lies outside"):
        prediction.curve([0.5, 1.5])
    with pytest.raises(OptionError, match="expansion='second' is not a choice: did you mean 'second-order'"):
        prediction.barrier(None, "second")
    with pytest.raises(OptionError, match="'hermite' holds for the whole network only.*'with-slopes'"):
        prediction.barrier(["conv1"], "hermite")
    assert prediction.barrier(prediction.layers, "hermite") == prediction.barrier(None, "hermite")


class _Untouchable:
    """A loader that must not be visited: bad input is refused before any work starts."""

    def __iter__(self):
        raise AssertionError("the loader was visited")


@pytest.mark.parametrize(
    ("model_b", "options", "error", "message"),
    [
        (CASES["tied weights"].model(), {}, ArchitectureMismatchError, r"conv1.weight: only in model_a, with shape"),
        (CONV.model(1), {"batch_norm": "freeze"}, OptionError, "batch_norm='freeze' is not a choice"),
        (CONV.model(1), {"method": "magic"}, OptionError, "method='magic' is not a choice"),
        (CONV.model(1), {"max_batches": 0}, OptionError, "max_batches=0"),
        (CONV.model(1), {"witness": 1}, OptionError, "witness=1: expected True or False"),
        (
            CONV.model(1),
            {"frozen": "conv9"},
            PartitionError,
            "frozen='conv9' matches no layer and no entry: did you mean",
        ),
        (CONV.model(1), {"allow_tf32": 1}, OptionError, "allow_tf32=1: expected True or False"),
    ],
)
def test_bad_input_is_refused_before_the_loader_is_visited(model_b, options, error, message, untyped):
    with pytest.raises(error, match=message):
        predict_barrier(CONV.model(0), model_b, _Untouchable(), **options)


def test_an_empty_loader_is_refused():
    with pytest.raises(LoaderError, match="yielded no batch; expected at least one"):
        predict_barrier(CONV.model(0), CONV.model(1), [], progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_cuda_device_gives_the_same_numbers(case):
    models = case.model(0), case.model(1)
    here = predict_barrier(*models, case.batches(), **case.options, progress=False)
    there = predict_barrier(*models, case.batches(), **case.options, device="cuda", progress=False)
    np.testing.assert_allclose(there.endpoints[1].curvature, here.endpoints[1].curvature, rtol=1e-7, atol=1e-9)
    measured = [
        measure_barrier(*models, case.batches(), **case.options, metrics=("loss",), device=device, progress=False)
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(measured[1].curve(), measured[0].curve(), rtol=1e-7, atol=1e-9)


def test_networks_in_inference_mode_are_predicted(prediction):
    with torch.inference_mode():
        models = CONV.model(0), CONV.model(1)
        again = predict_barrier(*models, CONV.batches(), progress=False)
        measured = measure_barrier(*models, CONV.batches(), alphas=3, progress=False)
    _same(prediction, again, 1e-10)
    assert measured.ends()[0] == pytest.approx(prediction.endpoints[0].loss)


@pytest.mark.parametrize("method", ["sweep", "hvp"])
@pytest.mark.parametrize("spoilt", ["model_a", "model_b"])
def test_values_that_are_not_finite_name_their_network(method, spoilt):
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(4, 3).double() for name in ("model_a", "model_b")}
    torch.nn.init.zeros_(models[spoilt].weight)
    torch.nn.init.zeros_(models[spoilt].bias)
    batches = [(torch.ones(6, 4).double(), torch.ones(6, 3).double())]
    loss_fns = {"curvature": lambda out, _: out.abs().pow(1.5).mean(), "loss": lambda out, _: (out / out).mean()}
    for what, loss_fn in loss_fns.items():
        with pytest.raises(NonFiniteError, match=rf"{what} .*at batch 0 \(6 examples\) at {spoilt}\."):
            predict_barrier(*models.values(), batches, loss_fn=loss_fn, method=method, witness=False, progress=False)
