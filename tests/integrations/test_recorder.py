"""Claim: a network in training is recorded when asked for, against the reference asked for, and is left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature import HessianOperator, Objective, measure_barrier, predict_barrier, top_eigenpairs
from lmc_curvature.errors import CheckpointError, LMCCurvatureError, OptionError, UnsupportedModelError
from lmc_curvature.integrations.recorder import Recorder

DRAWN = torch.Generator().manual_seed(0)
DATA = [(torch.randn(12, 5, generator=DRAWN), torch.randint(0, 3, (12,), generator=DRAWN)) for _ in range(3)]


def make_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def train(network, recorder=None, *, steps=6, first=0, epoch_of=3):
    """A loop as trainers have it; returns what was recorded, by step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9)
    recorded = {}
    if recorder is not None:
        recorder.begin(network, first)
    for step in range(first + 1, first + steps + 1):
        inputs, targets = DATA[random.randrange(3)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs + 0.1 * torch.randn_like(inputs)), targets).backward()
        optimizer.step()
        if recorder is not None:
            recorded[step] = recorder.after_step(network, step)
            if step % epoch_of == 0:
                recorded[step] |= recorder.after_epoch(network, step, step // epoch_of)
    return {step: numbers for step, numbers in recorded.items() if numbers}


def seeded(network, recorder=None, **options):
    """The loop from known random states; returns what was recorded, and what the loop left."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    found = train(network, recorder, **options)
    tensors = [*network.state_dict().values(), *(p.grad for p in network.parameters())]
    return found, tensors, (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: NPY002


@pytest.mark.check
def test_the_numbers_are_those_computed_by_hand():
    start, network = make_network(), make_network()
    found, *_ = seeded(
        network,
        Recorder(
            DATA,
            every_n_steps=3,
            record=["barrier", "predicted-barrier", "eigenvalues"],
            metrics=("loss", "error"),
            eigenvalues=2,
            max_batches=2,
            prefix="x/",
            batch_norm="batch",
            on_error="raise",
        ),
    )
    options = {"max_batches": 2, "batch_norm": "batch", "progress": False}
    measured = measure_barrier(network, start, DATA, alphas=[0.5], **options)
    predicted = predict_barrier(network, start, DATA, **options)
    values = top_eigenpairs(HessianOperator(Objective(network, DATA, max_batches=2, batch_norm="batch")), 2).values
    assert list(found) == [3, 6]
    assert found[6] == pytest.approx({
        "x/barrier": float(measured.curve()[0]),
        "x/barrier_standard_error": measured.standard_error(),
        "x/error_barrier": float(measured.curve("error")[0]),
        "x/error_barrier_standard_error": measured.standard_error("error"),
        "x/predicted_barrier": float(predicted.curve([0.5])[0]),
        "x/predicted_barrier_standard_error": predicted.standard_error(alpha=0.5),
        "x/predicted_maximum": predicted.barrier(),
        "x/predicted_maximum_standard_error": predicted.standard_error(),
        "x/predicted_maximum_expansion_error": predicted.expansion_error(),
        "x/eigenvalue_1": float(values[0]),
        "x/eigenvalue_2": float(values[1]),
    }, rel=1e-5, abs=1e-9)  # fmt: skip
    assert found[3] != found[6]


def test_a_valley_is_below_zero_whether_measured_or_predicted():
    """On a convex loss the midpoint lies below the chord, and the curve's highest points are its ends."""
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    recorder = Recorder(DATA, every_n_steps=1, record=["barrier", "predicted-barrier"], on_error="raise")
    recorder.begin(network, 0)
    ends = [copy.deepcopy(network), network]
    with torch.no_grad():
        network.weight.add_(torch.randn(3, 5))
        middle = copy.deepcopy(network)
        middle.weight.copy_((ends[0].weight + network.weight) / 2)
        first, second, half = (
            sum(nn.functional.cross_entropy(each(x), y).item() for x, y in DATA) / 3 for each in (*ends, middle)
        )
    found, expected = recorder.after_step(network, 1), half - (first + second) / 2
    assert expected < -0.01
    assert found["lmc/barrier"] == pytest.approx(expected, rel=1e-4)
    assert found["lmc/predicted_barrier"] == pytest.approx(expected, rel=1e-4)
    assert found["lmc/predicted_barrier_standard_error"] == pytest.approx(found["lmc/barrier_standard_error"], rel=1e-3)
    assert found["lmc/predicted_maximum"] == 0


@pytest.mark.check
def test_training_goes_on_as_if_nothing_were_computed():
    plain, network = make_network(), make_network()
    for each in (plain, network):
        each[0].bias.requires_grad_(False)
    _, expected, drawn = seeded(plain)
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*DATA, strict=True)))
    loader = torch.utils.data.DataLoader(data, batch_size=9, shuffle=True, generator=generator)
    before = generator.get_state()
    record = ["barrier", "predicted-barrier", "eigenvalues"]
    found, tensors, drawn_after = seeded(network, Recorder(loader, every_n_steps=2, record=record, on_error="raise"))
    assert list(found) == [2, 4, 6]
    assert len(tensors) == len(expected)
    for one, other in zip(tensors, expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert drawn_after == drawn
    assert torch.equal(generator.get_state(), before)
    assert all(module.training for module in network.modules())
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_network_and_its_generators_are_left_as_they_were():
    found = {}
    for record in (None, ["barrier", "predicted-barrier", "eigenvalues"]):
        network = make_network().cuda()
        recorder = record and Recorder(DATA, every_n_steps=1, record=record, on_error="raise")
        if recorder:
            recorder.begin(network, 0)
        torch.cuda.manual_seed_all(0)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for step in (1, 2):
            nn.functional.cross_entropy(network(DATA[0][0].cuda()), DATA[0][1].cuda()).backward()
            optimizer.step()
            if recorder:
                assert len(recorder.after_step(network, step)) > 3
        found[record is None] = [*network.state_dict().values(), torch.rand(3, device="cuda")]
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))


def test_steps_and_epochs_are_counted():
    assert list(train(make_network(), Recorder(DATA, every_n_steps=4))) == [4]
    assert list(train(make_network(), Recorder(DATA, every_n_epochs=1))) == [3, 6]
    assert list(train(make_network(), Recorder(DATA, every_n_epochs=2))) == [6]
    recorder = Recorder(DATA, every_n_steps=2)
    recorder.begin(network := make_network(), 0)
    network[0].weight.data += 1
    # Where gradients are accumulated, trainers call after batches that make no step.
    assert [bool(recorder.after_step(network, step)) for step in (1, 2, 2, 3)] == [False, True, False, False]


@pytest.mark.check(after=1)
@pytest.mark.parametrize("kind", ["step", "file", "state dict", "wrapped"])
def test_the_reference_is_a_step_a_file_or_a_state_dict(kind, tmp_path):
    network, other = make_network(), make_network(seed=5)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}, "epoch": 2}, tmp_path / "b.pt")
    reference = {"step": 2, "file": tmp_path / "a.pt", "state dict": state, "wrapped": str(tmp_path / "b.pt")}[kind]
    if kind == "step":
        other.load_state_dict(make_network().state_dict())
        seeded(other, steps=2)
    found, *_ = seeded(network, Recorder(DATA, reference=reference, every_n_steps=2, on_error="raise"))
    # There is no barrier before the reference, nor at it.
    assert list(found) == ([4, 6] if kind == "step" else [2, 4, 6])
    expected = measure_barrier(network, other, DATA, alphas=[0.5], progress=False).barrier()
    assert found[6]["lmc/barrier"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_eigenvalues_need_no_reference():
    recorder = Recorder(DATA, reference=100, every_n_steps=3, record=["eigenvalues"], on_error="raise")
    assert list(train(make_network(), recorder)[3]) == ["lmc/eigenvalue_1"]
    recorder.begin(make_network(), 500)


@pytest.mark.parametrize("batch_norm", ["interpolate", "batch"])
def test_eigenvalues_are_of_the_parameters_alone(batch_norm):
    network = make_network().double()
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.05, 0.1)
    batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in DATA[0]]
    recorder = Recorder([batch], every_n_steps=1, record=["eigenvalues"], batch_norm=batch_norm, on_error="raise")
    recorder.begin(network, 0)
    found = recorder.after_step(network, 1)["lmc/eigenvalue_1"]
    plain = copy.deepcopy(network).eval()
    plain[1].train(batch_norm == "batch")
    parameters = dict(plain.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    buffers = {name: buffer.clone() for name, buffer in plain.named_buffers()}

    def loss(vector):
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        entries = {name: part.view_as(parameter) for (name, parameter), part in parts}
        output = torch.func.functional_call(plain, entries | {n: b.clone() for n, b in buffers.items()}, batch[0])
        return nn.functional.cross_entropy(output, batch[1])

    point = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, point))[-1]
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_part_of_what_is_trained():
    whole = nn.ModuleDict({"model": make_network(), "head": nn.Linear(2, 2)})
    recorder = Recorder(DATA, every_n_steps=1, network="model", on_error="raise")
    recorder.begin(whole, 0)
    start = make_network()
    whole["model"][4].weight.data.mul_(2)
    expected = measure_barrier(whole["model"], start, DATA, alphas=[0.5], progress=False).barrier()
    assert recorder.after_step(whole, 1)["lmc/barrier"] == pytest.approx(expected, rel=1e-5)


def _broken(output, target):
    raise RuntimeError("no such loss")


def test_an_error_is_told_and_training_goes_on_unless_it_shall_end():
    plain, network = make_network(), make_network()
    _, expected, drawn = seeded(plain, steps=5)
    with pytest.warns(UserWarning, match="Nothing was recorded after step 3: .*no such loss"):
        found, tensors, drawn_after = seeded(network, Recorder(DATA, every_n_steps=3, loss_fn=_broken), steps=5)
    assert found == {}
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    assert drawn_after == drawn
    with pytest.raises(LMCCurvatureError, match="no such loss"):
        train(make_network(), Recorder(DATA, every_n_steps=3, loss_fn=_broken, on_error="raise"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of every_n_steps and every_n_epochs; neither"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, "both was"),
        ({"every_n_steps": 0}, "every_n_steps=0: expected a whole number from 1"),
        ({"every_n_steps": 1, "record": []}, r"record=\[\]"),
        ({"every_n_steps": 1, "record": ["barriers"]}, "record='barriers' is not a choice: did you mean 'barrier'"),
        ({"every_n_steps": 1, "on_error": "ignore"}, "on_error='ignore' is not a choice"),
        ({"every_n_steps": 1, "reference": -1}, "reference=-1"),
        ({"every_n_steps": 1, "batchnorm": "batch"}, "option='batchnorm' is not a choice: did you mean 'batch_norm'"),
        ({"every_n_steps": 1, "metrics": ["accuracy"]}, "accuracy"),
    ],
)  # fmt: skip
def test_mistakes_are_found_when_it_is_made(options, message, untyped):
    with pytest.raises(OptionError, match=message):
        Recorder(DATA, **options)


def test_mistakes_are_found_when_training_begins(tmp_path):
    network = make_network()
    with pytest.raises(CheckpointError, match="does not exist"):
        Recorder(DATA, every_n_steps=1, reference=tmp_path / "absent.pt").begin(network, 0)
    with pytest.raises(CheckpointError, match="the reference.*does not fit Sequential"):
        Recorder(DATA, every_n_steps=1, reference=nn.Linear(5, 6).state_dict()).begin(network, 0)
    with pytest.raises(OptionError, match=r"after 0 steps.*continues at step 7: pass reference=FILE"):
        Recorder(DATA, every_n_steps=1).begin(network, 7)
    with pytest.raises(OptionError, match="network='modle': ModuleDict has no such module: did you mean 'model'"):
        Recorder(DATA, every_n_steps=1, network="modle").begin(nn.ModuleDict({"model": network}), 0)
    with pytest.raises(OptionError, match=r"ModuleDict has no forward.*network= with.*\(there are 'model'\)"):
        Recorder(DATA, every_n_steps=1).begin(nn.ModuleDict({"model": network, "rest": nn.ModuleList()}), 0)
    inner = nn.ModuleDict({"inner": nn.ModuleDict({"model": network})})
    with pytest.raises(OptionError, match=r"\(there are 'inner.model'\)"):
        Recorder(DATA, every_n_steps=1, network="inner").begin(inner, 0)
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)
    with pytest.raises(OptionError, match="persistent workers"):
        Recorder(loader, every_n_steps=1).begin(network, 0, training_data=loader)
    network[0].weight.ds_id = 3
    with pytest.raises(UnsupportedModelError, match="Parameter '0.weight' is spread over several processes"):
        Recorder(DATA, every_n_steps=1).begin(network, 0)
