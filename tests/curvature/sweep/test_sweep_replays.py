"""Claim: a sweep that is replayed as a CUDA graph gives what a sweep gives, and its device is not waited for."""

import dataclasses
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmc_curvature import Objective, project_hessian
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep import sweep
from lmc_curvature.errors import FallbackWarning
from lmc_curvature.objective.batches import map_tensors
from lmc_curvature.replay import Replays
from lmc_curvature.sources.resnets import resnet20
from tests.support.cases import CASES
from tests.support.devices import gpu
from tests.support.networks import randomized
from tests.support.replaying import let_replay
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

_NAMES = ["conv, interpolate", "conv, batch", "attention", "LSTM", "tied weights", "dict batches", "LayerNorm and GELU"]


def _objective(name, sizes=(4, 4, 3, 4), **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **{**case.options, **options})


def _states(objective):
    """The objective's own state, and one beside it."""
    generator = torch.Generator().manual_seed(5)
    own = objective.state()
    return [
        own,
        {
            # Variances stay positive.
            name: tensor * (1 + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            for name, tensor in own.items()
        },
    ]


# --- On a CPU, by a stand-in that repeats the call on its own copies


@pytest.mark.check
@pytest.mark.parametrize("name", _NAMES)
def test_replays_are_sweeps_of_other_batches_states_and_directions(name):
    plain, replaying = _objective(name), _objective(name)
    repeater = let_replay(replaying)
    for state in _states(plain):
        for seed in (0, 1):
            directions = layer_directions(plain, seed=seed)
            found, expected = (swept(objective, directions, state) for objective in (replaying, plain))
            assert_projections_agree(found, expected, relative=1e-13)
    # Those of four examples and of three, each at its second sweep.
    assert repeater.recorded == 2
    assert repeater.replayed == 4 * 4 - 2


@pytest.mark.check
@pytest.mark.parametrize("tiling", [Tiling(2, 99, True), Tiling(2, 3, False), Tiling(4, 2, True)])
def test_tiles_and_groups_of_directions_are_replayed_together(tiling):
    objective = _objective("conv, interpolate", (4, 4, 4))
    repeater = let_replay(objective)
    assert_sweep_agrees(objective, tiling=tiling)
    assert (repeater.recorded, repeater.replayed) == (1, 2)


def test_a_network_that_has_changed_is_recorded_anew():
    scale = [1.0]
    model = randomized(TwoLayers().double())
    objective = Objective(
        model, vectors(4, 4), loss_fn=lambda output, target: scale[0] * output.square().mean(), witness=False
    )
    repeater = let_replay(objective)
    directions = layer_directions(objective)
    for scale[0] in (1.0, 3.0):
        for _ in range(2):
            found = swept(objective, directions)
            expected = project_hessian(objective, {}, directions, method="hvp")
            assert_projections_agree(found, expected, relative=1e-9)
    assert repeater.recorded == 2


def test_what_is_returned_outlives_later_sweeps():
    objective = _objective("conv, interpolate", (4, 4, 4, 4))
    let_replay(objective)
    directions = layer_directions(objective)
    problem = posed(objective, directions)
    swept(objective, directions)
    (compiled, *_) = compiled_batches(objective, directions)
    with objective.one_pass(progress=False) as batches:
        sweeps = [sweep.sweep_batch(problem, compiled, problem.points[0], batch) for batch in batches]
    for batch, (read, result) in zip(objective.loader, sweeps, strict=True):
        loss, slopes, curvature = read()
        torch.testing.assert_close(torch.nn.functional.cross_entropy(result, batch[1]).item(), loss)
        assert np.isfinite(slopes).all()
        np.testing.assert_allclose(curvature, curvature.T)
    assert len({read()[0] for read, _ in sweeps}) == 4


def test_what_cannot_be_recorded_is_swept_with_a_warning_that_names_the_operation(monkeypatch):
    objective = _objective("conv, interpolate", (4, 4, 4))
    repeater = let_replay(objective)
    directions = layer_directions(objective)
    expected = swept(_objective("conv, interpolate", (4, 4, 4)), directions)
    monkeypatch.setattr(type(repeater), "__call__", lambda self, run: _waits(run))
    with pytest.warns(FallbackWarning, match=r"cannot be replayed as a CUDA graph: Operation aten\.\S+ of the loss"):
        found = project_hessian(objective, {}, directions, method="sweep")
    assert_projections_agree(found, expected, relative=1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project_hessian(objective, {}, directions, method="sweep")


def _waits(run):
    class Refusal(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                raise RuntimeError("called a synchronizing CUDA operation")
            return func(*args, **(kwargs or {}))

    with Refusal():
        return run()


@pytest.mark.check
def test_what_a_replay_computes_in_goes_with_the_objective():
    objective = _objective("conv, interpolate", (4, 4, 4))
    let_replay(objective)
    swept(objective, layer_directions(objective))
    (replay,) = objective.replays._replays.values()
    kept = [*map(weakref.ref, replay._buffers), *map(weakref.ref, replay._outcome[0])]
    del replay
    gc.collect()
    assert all(reference() is not None for reference in kept)
    del objective
    gc.collect()
    assert all(reference() is None for reference in kept)


class _Questions(TorchDispatchMode):
    """Counts the numbers that are asked for, and the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.numbers = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.numbers += "_local_scalar_dense" in func.name()
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [2, 20])
def test_few_questions_are_asked_beside_a_replay_however_many_entries_there_are(layers):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)), torch.nn.Linear(4, 3))
    batch = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    objective = Objective(model, [batch])
    # What is replayed is not counted.
    objective.replays = Replays(lambda: lambda run: (lambda: None, run()))
    directions = {
        name: {entry: tensor.float() for entry, tensor in direction.items()}
        for name, direction in layer_directions(objective).items()
    }
    for _ in range(2):
        project_hessian(objective, {}, directions, method="sweep")
    with _Questions() as asked:
        project_hessian(objective, {}, directions, method="sweep")
    assert asked.numbers <= 10
    # The network itself is called, to see that it has not changed.
    assert asked.operations <= 130 + 2 * layers


# --- On tensors without numbers, which raise an error where a number is asked for


class _OneDevice(TorchDispatchMode):
    """Refuses what a CUDA device would be waited for: numbers copied to it or indices that lie elsewhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        # A number may be an argument of an operation on a device, but not be copied there.
        scalars = all(tensor.ndim == 0 for tensor in tensors if tensor.device.type == "cpu")
        copies = any(word in func.name() for word in ("copy", "index"))
        assert len(devices) < 2 or (scalars and not copies), f"{func} on {devices}"
        return found


def test_what_a_device_is_waited_for_is_told():
    with FakeTensorMode(), _OneDevice():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        there * torch.tensor(2.0)
        for wait in (lambda: there[[0, 1]], lambda: here.to("cuda"), there.cpu, lambda: there + here):
            with pytest.raises((AssertionError, RuntimeError), match="cuda"):
                wait()
        with pytest.raises(DataDependentOutputException):
            there.sum().item()


@pytest.mark.check
@pytest.mark.parametrize("name", [*_NAMES, "ResNet-20", "in tiles"])
def test_the_device_is_not_waited_for(name, monkeypatch):
    if name == "ResNet-20":
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
        objective, tiling = Objective(resnet20(), [images], witness=False), None
    elif name == "in tiles":
        objective, tiling = _objective("conv, interpolate", (5,), witness=False), Tiling(2, 3, False)
    else:
        objective, tiling = _objective(name, (4,), witness=False), None
    directions = layer_directions(objective)
    swept(objective, directions, tiling=tiling)
    problem, (compiled,) = (
        posed(objective, directions, tiling=tiling),
        compiled_batches(objective, directions, tiling=tiling),
    )
    with objective.one_pass(progress=False) as batches:
        (batch,) = batches

    def adjoints(outputs, inputs, seeds=None, **options):
        # The engine needs a device.
        found = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        return [each * 1 if options.get("create_graph") else torch.empty_like(each) for each in found]

    monkeypatch.setattr(torch.autograd, "grad", adjoints)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def there(tensor):
            return torch.empty_like(mode.from_tensor(tensor), device="cuda")

        for program in (*compiled.networks.values(), *([compiled.loss] if compiled.loss is not None else [])):
            _bring(program, there, monkeypatch)
        point, given, data = map_tensors(there, (problem.points[0].state, list(problem.directions), batch.data))
        elsewhere = dataclasses.replace(problem, directions=given, memo=type(problem.memo)())
        with _OneDevice():
            (numbers, result), _ = sweep._on_device(
                elsewhere, compiled, sweep.Point(point), dataclasses.replace(batch, data=data)
            )
    assert numbers.device.type == result.device.type == "cuda"
    assert numbers.dtype == torch.float64


def _bring(program, there, monkeypatch):
    """Let the constants and the new tensors of a graph lie on a device."""
    for plan in (program.prelude, program.body):
        module = plan.stage.module
        for node in plan.stage.operations:
            if node.op == "get_attr":
                monkeypatch.setattr(module, node.target, there(getattr(module, node.target)))
            elif "device" in node.kwargs:
                monkeypatch.setattr(node, "kwargs", {**node.kwargs, "device": torch.device("cuda")})
    program.__dict__.pop("constants", None)


# --- On a device


def _on(device, name, dtype=torch.float64, **options):
    return _objective(name, device=device, dtype=dtype, **options)


@gpu
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_graphs_on_a_device_give_what_a_cpu_gives(name, dtype, relative):
    here, there = _on("cpu", name), _on("cuda", name, dtype)
    for state in _states(here):
        for seed in (0, 1):
            directions = layer_directions(here, seed=seed)
            found, expected = (swept(objective, directions, state) for objective in (there, here))
            assert_projections_agree(found, expected, relative=relative)
    assert len(there.replays._replays) == 2
    assert not there.replays._failures


@gpu
@pytest.mark.parametrize("tiling", [Tiling(2, 99, True), Tiling(2, 3, False)])
def test_graphs_are_what_is_launched_one_by_one(tiling):
    directions = layer_directions(_on("cpu", "conv, interpolate"))
    graphed, eager = (_on("cuda", "conv, interpolate", torch.float32) for _ in range(2))
    eager.replays = Replays(None)
    for _ in range(3):
        found, expected = (swept(objective, directions, tiling=tiling) for objective in (graphed, eager))
        assert_projections_agree(found, expected, relative=1e-6)


@gpu
def test_memory_goes_with_the_objective():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=generator), torch.randint(10, (64,), generator=generator)
    objective = Objective(resnet20(), [images], device="cuda", witness=False)
    directions = layer_directions(objective, "fused")
    for _ in range(3):
        swept(objective, directions)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    del objective
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held / 2
