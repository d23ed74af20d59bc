import pytest
import torch

from lmc_curvature.errors import ConfigurationError, DataError, PartitionError
from lmc_curvature.forking import ForkConfig, run_forks
from lmc_curvature.forking.checks import check_fit
from lmc_curvature.sources import load_data


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"model": "resnet20"},
            ConfigurationError,
            r"'resnet20' cannot take images of shape \(1, 8, 8\) from 'digits'",
        ),
        ({"model_options": {"num_classes": 4}}, ConfigurationError, r"gives \(2, 4\) .*a tensor \(2, 10\)"),
        (
            {"model": "tests.support.experiments:Unsteady", "model_options": {"training": "a pair"}},
            ConfigurationError,
            r"in training, .*Unsteady' gives tuple .*expected logits alone, a tensor \(2, 10\).*aux_logits: false",
        ),
        (
            {"model": "tests.support.experiments:Unsteady", "model_options": {"training": "an assertion"}},
            ConfigurationError,
            r"in training, .*Unsteady' cannot take images of shape \(1, 8, 8\) .*Wrong image height",
        ),
        (
            {"model": "tests.support.experiments:Unsteady", "model_options": {}, "limit": 151},
            ConfigurationError,
            r"'digits', 1 a batch \(Expected more than 1 value per channel",
        ),
        ({"data": "no-such-place"}, DataError, "'no-such-place' is neither"),
    ],
)
def test_a_network_or_data_set_that_does_not_fit_is_refused(tmp_path, settings, watch, change, error, message):
    with pytest.raises(error, match=message):
        run_forks(ForkConfig(**{**settings, **change}), tmp_path, progress=False)
    assert watch.steps == 0
    assert not (tmp_path / "parent").exists()


def test_trying_the_network_out_leaves_no_trace(settings):
    before = torch.random.get_rng_state()
    # Draws random numbers in training.
    config = ForkConfig(**{**settings, "model": "tests.support.experiments:Unsteady", "model_options": {}})
    check_fit(config, load_data("digits", limit=150))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trace": {"partition": "fusd"}}, PartitionError, "did you mean 'fused'"),
        ({"trace": {"examples": 151}}, DataError, r"trace\.examples: 151 were asked for; the train split has 150"),
        (
            {"trace": {"examples": 361}, "limit": 400},
            DataError,
            r"trace\.examples: 361 were asked for; the test split has 360",
        ),
    ],
)
def test_what_cannot_be_traced_is_known_before_training(tmp_path, settings, watch, change, error, message):
    with pytest.raises(error, match=message):
        run_forks(ForkConfig(**{**settings, **change}), tmp_path, progress=False)
    assert watch.steps == 0
    assert not (tmp_path / "parent").exists()
