"""Claim: memory that the machine, a container or a device has left is known; estimates are what is really taken."""

import math

import psutil
import pytest
import torch
from torch import nn

from lmc_curvature import BatchLoss, Objective, Segment, project_hessian
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.projection.by_sweep import project_by_sweep
from lmc_curvature.curvature.sweep import expected_bytes, sweep_batch
from lmc_curvature.curvature.sweep.memory import container_bytes, free_bytes
from lmc_curvature.errors import FallbackWarning, MemoryBudgetError
from lmc_curvature.sources.resnets import resnet20
from tests.support.memory import peak_of_tensors
from tests.support.sweeping import assert_projections_agree, compiled_batches, posed

_CPU = torch.device("cpu")
_MIB = 2.0**20


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_machine_has_no_more_free_than_it_has():
    assert 0 < free_bytes(_CPU) <= psutil.virtual_memory().total


def test_no_control_groups_limit_nothing(tmp_path):
    assert container_bytes(tmp_path) == math.inf


def test_the_limit_of_a_container_counts(tmp_path):
    group = "sys/fs/cgroup/outer/inner"
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "300\n",
            f"{group}/memory.stat": "anon 100\ninactive_file 50\n",
            "sys/fs/cgroup/outer/memory.max": "1000\n",
            "sys/fs/cgroup/outer/memory.current": "400\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 100\ninactive_file 150\n",
        },
    )
    assert container_bytes(tmp_path) == 1000 - 400 + 150


def test_the_older_version_of_control_groups_is_known(tmp_path):
    group = "sys/fs/cgroup/memory"
    _write(
        tmp_path,
        {
            # The container sees its own group as the outermost.
            "proc/self/cgroup": "5:cpu:/job\n4:memory,blkio:/job/7\n",
            f"{group}/memory.limit_in_bytes": "2000\n",
            f"{group}/memory.usage_in_bytes": "1900\n",
            f"{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
        },
    )
    assert container_bytes(tmp_path) == 200


def test_a_container_that_holds_more_than_it_may_has_nothing_left(tmp_path):
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "10\n",
            "sys/fs/cgroup/memory.current": "30\n",
            "sys/fs/cgroup/memory.stat": "inactive_file 5\n",
        },
    )
    assert container_bytes(tmp_path) == 0


def _convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _wide():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 10)
    )


def _language():
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1024, "n_positions": 32}
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def _next_token(model, batch):
    return model(input_ids=batch, labels=batch).loss


def _image_problem(make, batch_norm, examples):
    torch.manual_seed(0)
    models = make(), make()
    batches = [(torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,)))]
    directions = Segment(*models, batch_norm=batch_norm).directions()
    return Objective(models[0], batches, batch_norm=batch_norm), directions


def _language_problem():
    torch.manual_seed(0)
    models = _language(), _language()
    objective = Objective(models[0], [torch.randint(1024, (8, 32))], loss_fn=BatchLoss(_next_token))
    return objective, Segment(*models).directions()


_TILINGS = Tiling(999, 99, True), Tiling(8, 99, True), Tiling(8, 99, False)


@pytest.mark.check
@pytest.mark.parametrize("tiling", _TILINGS, ids=str)
@pytest.mark.parametrize(
    ("make", "batch_norm", "examples", "most"),
    [
        (resnet20, "batch", 32, 99),
        (resnet20, "batch", 32, 2),
        (resnet20, "interpolate", 32, 99),
        (_convolutional, "interpolate", 32, 99),
        (_wide, "interpolate", 2048, 99),
        (_wide, "interpolate", 2048, 2),
    ],
)
def test_estimates_are_what_is_taken(make, batch_norm, examples, most, tiling):
    objective, directions = _image_problem(make, batch_norm, examples)
    _assert_estimated(objective, dict(list(directions.items())[:most]), tiling)


@pytest.mark.check
@pytest.mark.parametrize("most", [99, 4])
def test_estimates_for_a_language_model_are_what_is_taken(most):
    """What it computes of its logits is swept in chunks of tokens, and in groups of layers."""
    _assert_estimated(*_language_problem(), Tiling(999, most, True))


def _assert_estimated(objective, directions, tiling):
    """Assert that the model of memory is within a quarter of what is taken, either way."""
    problem = posed(objective, directions, tiling=tiling)
    (point,) = problem.points
    with objective.one_pass() as visit:
        batch = next(iter(visit))
        project_by_sweep(problem, point, batch)
    (compiled,) = compiled_batches(objective, directions, tiling=tiling)
    taken = peak_of_tensors(lambda: sweep_batch(problem, compiled, point, batch)[0]())
    assert 1 / 1.25 < expected_bytes(problem, compiled) / taken < 1.25


def _images(count):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator))]


@pytest.mark.check
def test_a_batch_that_fits_no_sweep_is_answered_by_products():
    torch.manual_seed(0)
    models, batches = (resnet20(width=4), resnet20(width=4)), _images(32)
    objective = Objective(models[0], batches, batch_norm="batch")
    directions = Segment(*models, batch_norm="batch").directions()
    with pytest.raises(MemoryBudgetError, match="2 of 22 directions, 32 of 32 examples at a time, takes about .* GiB"):
        project_hessian(objective, {}, directions, method="sweep", memory_gib=0.01)
    with pytest.warns(FallbackWarning, match="more than the budget of 0.01 GiB.*one Hessian-vector product a dir"):
        found = project_hessian(objective, {}, directions, memory_gib=0.01)
    expected = project_hessian(objective, {}, directions, method="hvp")
    assert_projections_agree(found, expected, relative=0)
