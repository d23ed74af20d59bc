"""Claim: convolutions are swept exactly, alone and with the sums and rectifiers after them."""

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective, project_hessian
from lmc_curvature.sources.resnets import resnet
from tests.support.networks import randomized
from tests.support.rules import RuleTests
from tests.support.sweeping import (
    assert_projections_agree,
    assert_sweep_agrees,
    layer_directions,
    swept,
)

LINE, IMAGE, VOLUME = (2, 9), (2, 5, 6), (2, 3, 4, 4)

# Annotations are checked by the tests of other networks; here that would take as long as the computation.
pytestmark = [pytest.mark.usefixtures("untyped")]


class TestConvolutions(RuleTests):
    operations: ClassVar = {
        "conv1d": (nn.Conv1d(2, 3, 3), LINE),
        "conv2d": (nn.Conv2d(2, 3, 3, padding=1), IMAGE),
        "conv2d strided, without bias": (nn.Conv2d(2, 4, 3, stride=2, bias=False), IMAGE),
        "conv2d dilated": (nn.Conv2d(2, 3, 2, dilation=2), IMAGE),
        "conv2d grouped": (nn.Conv2d(2, 4, 3, groups=2), IMAGE),
        "conv2d depthwise": (nn.Conv2d(2, 2, 3, groups=2, padding=1), IMAGE),
        "conv2d padded to the same": (nn.Conv2d(2, 3, 3, padding="same"), IMAGE),
        "conv2d padded by reflection": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
        "conv2d padded by replication": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), IMAGE),
        "conv2d padded by the other side": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), IMAGE),
        "conv3d": (nn.Conv3d(2, 3, 2), VOLUME),
        "transposed conv1d": (nn.ConvTranspose1d(2, 3, 3, stride=2), LINE),
        "transposed conv2d": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), IMAGE),
        "transposed conv2d grouped": (nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2), IMAGE),
        "transposed conv3d": (nn.ConvTranspose3d(2, 3, 2), VOLUME),
        "convolution by computed weights": (lambda x, w: F.conv2d(x, w.mean(0).unsqueeze(1)), (1, 5, 6), (3, 2, 2)),
    }


_FORMS = {
    "alone": lambda net, x: F.relu(net.second(x)),
    "with batch norm": lambda net, x: F.relu(net.norm(net.second(x))),
    "sum": lambda net, x: F.relu(net.second(x) + x),
    "sum in place": lambda net, x: net.second(x).add_(x).relu_(),
    "sum, the other way round": lambda net, x: F.relu(x + net.norm(net.second(x))),
    "sum of two": lambda net, x: F.relu(net.second(x) + net.third(x)),
    "sum with what no direction moves": lambda net, x: F.relu(net.second(x) + torch.ones_like(x)),
    "of what no direction moves": lambda net, x: F.relu(net.second(torch.ones_like(x)) + x),
    "weight used twice": lambda net, x: F.relu(net.second(F.relu(net.second(x)))),
    "no bias": lambda net, x: F.relu(F.conv2d(x, net.second.weight, padding=1)),
    "depthwise": lambda net, x: F.relu(net.depthwise(x) + x),
    "transposed": lambda net, x: F.relu(net.transposed(x) + x),
    "strided and dilated": lambda net, x: F.relu(net.strided(x)),
    "one dimension": lambda net, x: F.relu(net.flat(x.flatten(2))),
    "a convolution and itself": lambda net, x: F.relu((z := net.second(x)) + z),
    "convolution read twice": lambda net, x: F.relu((z := net.second(x)) + x) + z,
    "sum read twice": lambda net, x: F.relu(z := net.second(x) + x) + z,
    "weighted sum": lambda net, x: F.relu(torch.add(net.second(x), x, alpha=2)),
    "sum that spreads": lambda net, x: F.relu(net.second(x) + x.mean((2, 3), keepdim=True)),
    "another activation": lambda net, x: F.silu(net.second(x) + x),
}


class _Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.transposed = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
        self.flat = nn.Conv1d(4, 5, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        x = self.form(self, torch.tanh(self.first(x)))
        return self.last(x.flatten(1))


def _problem(form, *batch_sizes):
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _Net(form).double()
        net(torch.zeros(2, 3, 6, 5, dtype=torch.float64))
        net = randomized(net).eval()
    batches = [
        (
            torch.randn(size, 3, 6, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in batch_sizes or (3,)
    ]
    return net, batches


def _used(objective):
    """Random directions for the layers that the form uses."""
    gradient = objective.gradient({})
    return {
        layer: direction
        for layer, direction in layer_directions(objective).items()
        if any(gradient[name].any() for name in direction)
    }


@pytest.mark.check(after=1)
@pytest.mark.parametrize("form", _FORMS.values(), ids=_FORMS)
def test_they_agree_with_products(form):
    objective = Objective(*_problem(form, 3, 2))
    assert_sweep_agrees(objective, _used(objective))


@pytest.mark.check(after=1)
@pytest.mark.parametrize("form", _FORMS.values(), ids=_FORMS)
def test_they_agree_in_single_precision(form):
    net, batches = _problem(form)
    exact = Objective(net, batches)
    directions = _used(exact)
    single = Objective(copy.deepcopy(net).float(), [(x.float(), y) for x, y in batches])
    assert_projections_agree(
        swept(single, directions), project_hessian(exact, {}, directions, method="hvp"), relative=2e-4
    )


_STRIDED = {
    # The last bias moves no difference of outputs if it is a single number.
    "expanded": lambda tensor: tensor[..., :1].expand(tensor.shape) if tensor.shape != (3,) else tensor,
    "every other number": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "channels last": lambda tensor: (
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    ),
}


@pytest.mark.check(after=1)
@pytest.mark.parametrize("strided", _STRIDED.values(), ids=_STRIDED)
@pytest.mark.parametrize("form", ["alone", "with batch norm", "sum", "strided and dilated"])
def test_directions_may_lie_in_memory_as_they_like(form, strided):
    net, batches = _problem(_FORMS[form])
    exact = Objective(net, batches)
    directions = {
        layer: {name: strided(tensor) for name, tensor in direction.items()}
        for layer, direction in _used(exact).items()
    }
    single = Objective(copy.deepcopy(net).float(), [(x.float(), y) for x, y in batches])
    expected = project_hessian(exact, {}, directions, method="hvp")
    assert_projections_agree(swept(exact, directions), expected, relative=1e-9)
    coarse = {
        layer: {name: strided(tensor.float()) for name, tensor in direction.items()}
        for layer, direction in directions.items()
    }
    assert_projections_agree(swept(single, coarse), expected, relative=2e-4)


@pytest.mark.check
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["alone", "with batch norm", "sum", "sum of two", "one dimension"])
def test_a_bias_may_move_without_its_weight(form, dtype):
    net, batches = _problem(_FORMS[form])
    exact = Objective(net, batches)
    directions = {
        name: {name: tensor}
        for direction in _used(exact).values()
        for name, tensor in direction.items()
        if tensor.ndim == 1
    }
    # With and without a direction that comes from above.
    for chosen in (directions, {name: d for name, d in directions.items() if not name.startswith("first")}):
        chosen = chosen | {"together": {name: d[name] for name, d in chosen.items()}}
        objective = Objective(copy.deepcopy(net).to(dtype), [(x.to(dtype), y) for x, y in batches])
        expected = project_hessian(exact, {}, chosen, method="hvp")
        assert_projections_agree(swept(objective, chosen), expected, relative=2e-4 if dtype == torch.float32 else 1e-9)


# Of torch itself, which reads all settings of oneDNN to restore them.
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_without_onednn_they_agree_too():
    with torch.backends.mkldnn.flags(enabled=False):
        test_they_agree_in_single_precision(_FORMS["sum"])


def test_values_and_directions_stay_as_they_were():
    objective = Objective(*_problem(_FORMS["sum"]))
    directions = _used(objective)
    kept = {
        layer: {name: tensor.clone() for name, tensor in direction.items()} for layer, direction in directions.items()
    }
    before = {name: tensor.clone() for name, tensor in objective.state().items()}
    for _ in range(2):
        swept(objective, directions)
    for layer, direction in kept.items():
        assert all(torch.equal(tensor, directions[layer][name]) for name, tensor in direction.items())
    assert all(torch.equal(tensor, objective.state()[name]) for name, tensor in before.items())


def test_a_bias_as_large_as_the_output_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3), nn.Tanh()).double()
    batch = torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    objective = Objective(randomized(model), [batch])
    direction = {"0.bias": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)}
    kept = direction["0.bias"].clone()
    for _ in range(2):
        assert_projections_agree(
            swept(objective, [direction]), project_hessian(objective, {}, [direction], method="hvp"), relative=1e-9
        )
    assert torch.equal(direction["0.bias"], kept)


@pytest.mark.check
def test_single_precision_near_kinks_is_no_disagreement():
    # Some of these images have units so near to zero that their sign depends on the road taken there.
    torch.manual_seed(0)
    model, other = (resnet(8, num_classes=10, shortcut="projection") for _ in range(2))
    x = torch.randn(64, 3, 32, 32)
    model.train()
    with torch.no_grad():
        model(x)
    objective = Objective(model.eval(), [(x, torch.randint(10, (64,)))])
    state = objective.state()
    displacement = {name: tensor - state[name] for name, tensor in other.state_dict().items() if name in state}
    directions = [{name: tensor} for name, tensor in displacement.items() if name.endswith("weight")]
    found = swept(objective, directions)
    assert found.curvature.shape == (len(directions), len(directions))
