import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from lmc_curvature.errors import CheckpointError, NonFiniteError, OptionError
from lmc_curvature.forking import TrainingConfig, TrainingState, evaluate, train
from lmc_curvature.forking.training import capture_state, learning_rate_at
from lmc_curvature.sources import ImageDataset, digits_resnet, load_data, make_model

CONFIG = TrainingConfig(epochs=4, learning_rate=0.1, milestones=(3,), weight_decay=1e-4, batch_size=48, warmup_epochs=2)


@pytest.fixture(scope="module")
def data():
    return load_data("digits", limit=200)


@pytest.fixture(scope="module")
def rgb():
    """Sixteen small images, dark and bright."""
    targets = torch.arange(2).repeat(8)
    noise = torch.randint(0, 100, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (noise + 100 * targets.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageDataset(images, targets, ("dark", "bright"), torch.full((3,), 0.4), torch.full((3,), 0.2))


def small_model(seed=0, width=2):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digits_resnet(width=width)


def assert_same_bits(first: TrainingState, second: TrainingState):
    assert first.epoch == second.epoch
    assert first.history == second.history
    for a, b in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def run(data, *, order_seed=0, model=None, **options):
    model = small_model() if model is None else model
    return train(model, data, CONFIG, order_seed=order_seed, progress=False, **options)


def test_the_same_seed_gives_the_same_bits_whatever_the_global_seed(data):
    torch.manual_seed(1)
    first = run(data)
    torch.manual_seed(2)
    assert_same_bits(first, run(data))


@pytest.mark.check
def test_resnet18_without_normalisation_is_trained(rgb):
    torch.manual_seed(0)
    model = make_model("cifar-resnet18", normalization=False, num_classes=2)
    # As in configs/cifar10-resnet18-no-norm.yaml; four steps.
    config = TrainingConfig(epochs=2, learning_rate=0.05, weight_decay=1e-4, batch_size=8, warmup_epochs=2)
    before = capture_state(model)
    after = train(model, rgb, config, order_seed=0, progress=False)
    assert after.history[1].loss < after.history[0].loss
    moved = [name for name, tensor in after.model.items() if not torch.equal(tensor, before.model[name])]
    assert moved == [name for name, _ in model.named_parameters()]


def test_another_seed_gives_another_end(data):
    first, second = run(data, order_seed=0), run(data, order_seed=1)
    assert not torch.equal(first.model["linear.weight"], second.model["linear.weight"])


@pytest.mark.check(after=1)
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_continuing_from_a_file_gives_the_same_bits(data, tmp_path, epoch):
    straight = run(data)
    run(data, until=epoch).save(tmp_path / "state.safetensors")
    state = TrainingState.load(tmp_path / "state.safetensors")
    # Another network object, in another state, must make no difference.
    assert_same_bits(straight, run(data, start=state, model=small_model(seed=5)))


def test_a_step_is_the_textbook_step(data):
    config = TrainingConfig(epochs=2, learning_rate=0.5, momentum=0.5, weight_decay=0.1, batch_size=200)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    reference = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    reference.load_state_dict(model.state_dict())
    state = train(model, data, config, order_seed=0, progress=False)
    x, y = next(iter(data.batches(200)))
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for _ in range(2):
        loss = functional.cross_entropy(reference(x.double()), y)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                v.mul_(0.5).add_(g + 0.1 * p)
                p.sub_(0.5 * v)
    for (name, expected), v in zip(reference.named_parameters(), velocity, strict=True):
        assert torch.allclose(state.model[name].double(), expected, atol=1e-5)
        assert torch.allclose(state.optimizer[name].double(), v, atol=1e-5)


def test_every_epoch_visits_every_example_once_in_its_own_order(data):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            seen.append(x.clone())
            return self.linear(x.flatten(1))

    train(Spy(), data, CONFIG, order_seed=0, until=2, progress=False)
    assert [len(x) for x in seen] == [48, 48, 48, 48, 8] * 2
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert not torch.equal(first, second)
    everything, _ = next(iter(data.batches(200)))
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.flatten(1).tolist())) == sorted(map(tuple, everything.flatten(1).tolist()))


def test_images_are_augmented_by_the_order_seed(rgb):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 64, 2)

        def forward(self, x):
            seen.append(x.detach().clone())
            return self.linear(x.flatten(1))

    def inputs(augmentation, seed):
        seen.clear()
        config = TrainingConfig(epochs=1, learning_rate=0.1, batch_size=6, augmentation=augmentation)
        train(Spy(), rgb, config, order_seed=seed, progress=False)
        return torch.cat(seen)

    plain, augmented = inputs("none", 3), inputs("crop-flip", 3)
    assert torch.equal(augmented, inputs("crop-flip", 3))
    assert not torch.equal(augmented, inputs("crop-flip", 4))
    # The order is the same with and without: few images are cut out just where they were.
    assert (augmented == plain).flatten(1).all(1).sum() < 5


def test_dropout_is_reproducible_and_leaves_the_global_random_state_alone(data):
    def result():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        torch.manual_seed(torch.seed())
        before = torch.get_rng_state()
        state = run(data, model=model)
        assert torch.equal(before, torch.get_rng_state())
        return state

    assert_same_bits(result(), result())


def test_learning_rate_warms_up_and_drops():
    rates = [learning_rate_at(CONFIG, epoch, fraction=fraction) for epoch in range(4) for fraction in (0.5, 1.0)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_the_optimiser_uses_the_learning_rate_of_the_schedule(data):
    history = run(data).history
    assert [metrics.epoch for metrics in history] == [1, 2, 3, 4]
    assert [metrics.learning_rate for metrics in history] == pytest.approx([0.05, 0.1, 0.1, 0.01])


def test_metrics_are_means_over_examples(data):
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    config = TrainingConfig(epochs=1, learning_rate=1e-30, batch_size=48)
    metrics = train(frozen, data, config, order_seed=0, progress=False).history[0]
    loss, accuracy = evaluate(frozen, data, batch_size=64)
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    assert metrics.accuracy == pytest.approx(accuracy, abs=1e-12)


def test_training_learns_and_reports_each_epoch(data):
    reported = []
    model = small_model(width=8).eval()
    state = run(data, model=model, on_epoch=reported.append)
    assert tuple(reported) == state.history
    assert state.history[-1].loss < 0.5 * state.history[0].loss
    assert not model.training
    assert evaluate(model, data)[1] > 0.5


def test_a_state_does_not_change_when_training_goes_on(data):
    model = small_model()
    state = run(data, model=model, until=1)
    before = {name: tensor.clone() for name, tensor in state.model.items()}
    run(data, model=model, start=state)
    assert all(torch.equal(before[name], state.model[name]) for name in before)


def test_divergence_names_epoch_and_step(data):
    config = TrainingConfig(epochs=3, learning_rate=1e30, batch_size=50)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10))
    with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf) in epoch 1, step 2 of 4"):
        train(model, data, config, order_seed=0, progress=False)


def test_divergence_at_the_very_last_step_is_noticed(data):
    config = TrainingConfig(epochs=1, learning_rate=1e38, batch_size=200, weight_decay=1e30)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(NonFiniteError, match=r"'1\.weight' is not finite after epoch 1"):
        train(model, data, config, order_seed=0, progress=False)


def test_until_must_lie_within_the_schedule(data):
    with pytest.raises(OptionError, match="until=9 must lie between the epoch of the start, 0, and 4"):
        run(data, until=9)
    state = dataclasses.replace(capture_state(small_model()), epoch=3)
    with pytest.raises(OptionError, match="until=2 must lie between the epoch of the start, 3"):
        run(data, start=state, until=2)


def test_a_state_of_another_network_is_refused(data):
    state = capture_state(make_model("digits-resnet", width=4))
    with pytest.raises(CheckpointError, match="The state at epoch 0 does not fit CifarResNet"):
        run(data, start=state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_is_reproducible(data):
    assert_same_bits(run(data, model=small_model().cuda()), run(data, model=small_model().cuda()))


def test_entries_of_every_layout_survive_a_snapshot(tmp_path):
    model = nn.Module()
    model.register_buffer("transposed", torch.arange(6.0).view(2, 3).T)
    capture_state(model).save(tmp_path / "a.safetensors")
    assert torch.equal(TrainingState.load(tmp_path / "a.safetensors").model["transposed"], model.transposed)
