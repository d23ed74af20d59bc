"""Claim: a network comes out of training with the same bits whether or not others are trained in turns with it."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lmc_curvature.errors import ConfigurationError
from lmc_curvature.forking import Trainer, TrainingConfig, TrainingState, train, trainer
from lmc_curvature.forking.trainers import Trainers, trainers_that_fit
from lmc_curvature.sources import ImageDataset, digits_resnet, load_data, make_model

# What stands in for a CUDA device's streams and graphs is of other types.
pytestmark = pytest.mark.usefixtures("untyped")

# Batches of 48, 48, 48, 48 and 8.
CONFIG = TrainingConfig(epochs=3, learning_rate=0.1, milestones=(2,), weight_decay=1e-4, batch_size=48, warmup_epochs=2)
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]


@pytest.fixture(scope="module")
def data():
    return load_data("digits", limit=200)


def with_dropout():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(144, 10))


NETWORKS = {
    "a residual network": partial(digits_resnet, width=2),
    "a network with dropout": with_dropout,
    "a network with a frozen layer": lambda: frozen_first(digits_resnet(width=2)),
}


def frozen_first(model):
    next(model.parameters()).requires_grad_(False)
    return model


def made(network, device="cpu", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETWORKS[network]().to(device)


def changed(**changes):
    return TrainingConfig(**{**CONFIG.model_dump(), **changes})


def assert_same_bits(first: TrainingState, second: TrainingState):
    assert first.epoch == second.epoch
    assert first.history == second.history
    for a, b in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def course(trainer, seed):
    while trainer.epoch < CONFIG.epochs:
        yield from trainer.steps(seed)


def in_turns(trainers, seeds):
    """Train all to the end, a step of each at a time."""
    courses = [course(*pair) for pair in zip(trainers, seeds, strict=True)]
    while courses:
        courses = [each for each in courses if next(each, "over") is None]
    return [trainer.state() for trainer in trainers]


@pytest.mark.check
@pytest.mark.filterwarnings("ignore:Training takes longer")
@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("device", DEVICES)
def test_networks_trained_in_turns_have_the_bits_of_one_at_a_time(data, network, augmentation, device):
    config, model = changed(augmentation=augmentation), partial(made, network, device)
    alone = [train(model(), data, config, order_seed=seed, progress=False) for seed in (1, 2, 3)]
    # One of them is already a part of the way.
    start = train(model(), data, config, order_seed=2, until=1, progress=False)
    trainers = [Trainer(model(seed=seed), data, config) for seed in (0, 5, 0)]
    trainers[1].load(start)
    for found, expected in zip(in_turns(trainers, (1, 2, 3)), alone, strict=True):
        assert_same_bits(found, expected)
    assert not torch.equal(*(list(state.model.values())[-1] for state in alone[:2]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_trainer_forgets_the_network_it_had_before(data, device):
    model = partial(made, "a residual network", device)
    start = Trainer(model(), data, CONFIG).state()
    used = Trainer(model(seed=7), data, CONFIG)
    for _ in range(2):
        list(used.steps(9))
    # Stopped in the midst of an epoch.
    list(itertools.islice(used.steps(9), 2))
    used.load(start)
    assert not start.optimizer
    (found,) = in_turns([used], [4])
    assert_same_bits(found, train(model(), data, CONFIG, order_seed=4, progress=False))


def replayed_as_they_are(model, steps, stream, *, rewind, outcome):
    """Takes steps as for recording, and lets replays be the steps themselves."""
    for size, step in steps.items():
        outcomes = []
        for _ in range(3):
            rewind()
            step()
            outcomes.append(outcome())
        # Every step is the first, and its loss that of a network that knows nothing.
        assert torch.equal(outcomes[0], outcomes[2])
        assert outcomes[0][0].item() / size == pytest.approx(2.3, abs=1.5)
        assert outcomes[0][1] > 0
    return dict(steps)


@pytest.mark.check
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_taken_to_be_recorded_leave_no_trace(data, monkeypatch, momentum):
    config = changed(momentum=momentum)
    monkeypatch.setattr(trainer, "record_steps", replayed_as_they_are)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    recorded = Trainer(made("a residual network"), data, config)
    start = recorded.state()
    recorded._record(None)
    assert torch.equal(before, torch.get_rng_state())
    assert_same_bits(recorded.state(), start)
    (found,) = in_turns([recorded], [4])
    expected = train(made("a residual network"), data, config, order_seed=4, progress=False)
    assert_same_bits(found, expected)
    # And from the beginning again, with no momentum, and from the midst with some.
    for state in (start, train(made("a residual network"), data, config, order_seed=4, until=1, progress=False)):
        recorded.load(state)
        assert_same_bits(in_turns([recorded], [4])[0], expected)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_what_a_trainer_holds_is_freed_with_it(data, monkeypatch, is_recorded):
    # Graphs that live on, until garbage is collected, would take with them what others are computed in.
    monkeypatch.setattr(trainer, "record_steps", lambda *args, **kwargs: dict.fromkeys((48, 8), lambda: None))
    held = Trainer(made("a residual network"), data, CONFIG)
    if is_recorded:
        held._record(None)
    list(itertools.islice(held.steps(1), 3))
    assert held.replays == is_recorded
    alive = weakref.ref(held)
    gc.disable()
    try:
        del held
        assert alive() is None
    finally:
        gc.enable()


def test_a_step_that_cannot_be_replayed_is_taken_as_before(data, monkeypatch):
    monkeypatch.setattr(trainer, "record_steps", lambda *args, **kwargs: "it waits")
    plain = Trainer(made("a network with dropout"), data, CONFIG)
    with pytest.warns(UserWarning, match=r"^Training takes longer, because a step cannot be replayed: it waits\.$"):
        plain._record(None)
    (found,) = in_turns([plain], [4])
    assert_same_bits(found, train(made("a network with dropout"), data, CONFIG, order_seed=4, progress=False))


@pytest.mark.check
def test_a_step_on_a_gpu_waits_for_nothing(monkeypatch):
    # Tensors without numbers raise an error where a number is asked for, and where a device has to do with another.
    fused = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *lists, lr, **options: fused.append((*lists, lr)))
    monkeypatch.setattr(ImageDataset, "to", lambda data, device: data)
    monkeypatch.setattr(ImageDataset, "__post_init__", lambda data: None)
    device = torch.device("cuda", 0)
    with FakeTensorMode(), device:
        model = digits_resnet(width=2)
        # Both need a device, and are torch's.
        monkeypatch.setattr(model, "to", lambda **layout: model)
        monkeypatch.setattr(torch.Tensor, "__lt__", lambda rate, bound: False)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: [set_gradient(each) for each in model.parameters()])
        images, targets = torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
        data = ImageDataset(images, targets, tuple("0123456789"), torch.zeros(1), torch.ones(1))
        found = Trainer(model, data, changed(augmentation="crop-flip"))
        for size in (48, 48, 4):
            found._step(size)
    for parameters, gradients, momentum, rate in fused:
        assert rate.dtype == torch.float32
        assert {each.device for each in (rate, *parameters, *gradients, *momentum)} == {device}
        assert len(parameters) == len(momentum) == len(list(model.parameters()))
    assert len(fused) == 3


def set_gradient(parameter):
    parameter.grad = torch.empty_like(parameter)


def test_tf32_is_float32_on_a_cpu_and_bfloat16_is_close_to_it(data):
    def end(precision):
        model = made("a residual network")
        return train(model, data, changed(precision=precision), order_seed=1, progress=False)

    exact, rough = end("float32"), end("bfloat16")
    assert_same_bits(exact, end("tf32"))
    assert {tensor.dtype for tensor in rough.model.values()} == {torch.float32, torch.int64}
    assert {tensor.dtype for tensor in rough.optimizer.values()} == {torch.float32}
    losses = [[metrics.loss for metrics in state.history] for state in (exact, rough)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    with pytest.raises(ConfigurationError, match=r"precision: .*'float16'"):
        changed(precision="float16")


def test_trainers_are_used_again():
    built = itertools.count()
    trainers = Trainers(lambda: next(built), torch.device("cpu"))
    assert trainers.room(1) == 1
    with trainers.borrowed() as first, trainers.borrowed() as second:
        assert (first, second) == (0, 1)
    with pytest.raises(KeyError), trainers.borrowed() as third:
        raise KeyError
    with trainers.borrowed() as fourth, trainers.borrowed():
        assert third == fourth
    assert next(built) == 2


@pytest.mark.parametrize(
    ("free", "one", "processes", "expected"),
    [(0, 10, 1, 1), (24, 10, 1, 2), (25, 10, 1, 3), (25, 10, 2, 2), (100, 10, 1, 8), (10, 0, 1, 8)],
)
def test_as_many_trainers_as_fit(free, one, processes, expected):
    # Four fifths of what is free is used, and one is there already.
    assert trainers_that_fit(free, one, processes) == expected


def gpu_test(test):
    for mark in ON_A_GPU:
        test = mark(test)
    return test


PRECISIONS = ["float32", "tf32", "bfloat16"]


@gpu_test
@pytest.mark.filterwarnings("error:Training takes longer")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_steps_are_the_steps(data, precision):
    config = changed(precision=precision, augmentation="crop-flip")

    def end(**options):
        (state,) = in_turns([Trainer(made("a residual network", "cuda"), data, config, **options)], [1])
        return state

    replayed, plain = end(), end(cuda_graph=False)
    rough = 1e-4 if precision == "float32" else 0.02
    assert [metrics.loss for metrics in replayed.history] == pytest.approx(
        [metrics.loss for metrics in plain.history], rel=rough
    )
    assert [metrics.learning_rate for metrics in replayed.history] == [m.learning_rate for m in plain.history]
    for name, tensor in plain.model.items():
        spread = tensor.double().std(correction=0).item() if tensor.numel() > 1 else 0.0
        assert torch.allclose(replayed.model[name].double(), tensor.double(), rtol=0, atol=rough * (1 + spread))


@gpu_test
@pytest.mark.filterwarnings("error:Training takes longer")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("examples", [200, 192, 40])
def test_replays_continue_from_a_file_with_the_same_bits(precision, examples, tmp_path):
    # With a short last batch, without one, and with nothing else.
    data, config = load_data("digits", limit=examples), changed(precision=precision)
    straight = train(made("a residual network", "cuda"), data, config, order_seed=1, progress=False)
    part = train(made("a residual network", "cuda"), data, config, order_seed=1, until=1, progress=False)
    part.save(tmp_path / "state.safetensors")
    state = TrainingState.load(tmp_path / "state.safetensors")
    end = train(made("a residual network", "cuda", 5), data, config, order_seed=1, start=state, progress=False)
    assert_same_bits(end, straight)


@gpu_test
@pytest.mark.filterwarnings("error:Training takes longer")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_networks_replayed_side_by_side_have_the_bits_of_one(data, precision):
    config = changed(precision=precision, augmentation="crop-flip")

    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make_model("resnet20", in_channels=1).cuda()

    alone = [train(model(), data, config, order_seed=seed, progress=False) for seed in range(7)]
    for found, expected in zip(
        in_turns([Trainer(model(), data, config) for _ in range(7)], range(7)), alone, strict=True
    ):
        assert_same_bits(found, expected)


@gpu_test
def test_replays_are_close_to_training_on_a_cpu(data):
    ends = [
        train(made("a residual network", device), data, CONFIG, order_seed=1, progress=False)
        for device in ("cpu", "cuda")
    ]
    losses = [[metrics.loss for metrics in state.history] for state in ends]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


class Waits(nn.Module):
    """Reads a number of the device."""

    def forward(self, x):
        return x / x.abs().max().item()


@gpu_test
@pytest.mark.parametrize(
    ("module", "reason"), [(Waits(), "synchronizing"), (nn.Dropout(0.2), r"module '2' draws random numbers")]
)
def test_networks_that_cannot_be_replayed_are_trained_all_the_same(data, module, reason):
    def end():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), module, nn.Flatten(), nn.Linear(144, 10)).cuda()
        with pytest.warns(UserWarning, match=rf"a step cannot be replayed: .*{reason}"):
            return train(model, data, CONFIG, order_seed=1, progress=False)

    first = end()
    assert_same_bits(first, end())
    assert first.history[-1].loss < first.history[0].loss


@gpu_test
def test_a_gpu_has_room_for_several_small_networks(data):
    device = torch.device("cuda")
    trainers = Trainers(lambda: Trainer(made("a residual network", device), data, CONFIG), device)
    assert 1 < trainers.room(1) <= 8
