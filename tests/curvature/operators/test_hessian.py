"""Claim: a HessianOperator is the Hessian, checked against differences of the gradient, dense algebra and SciPy."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call

from lmc_curvature import HessianOperator, Objective, Segment, project_hessian
from lmc_curvature.errors import (
    DirectionError,
    FallbackWarning,
    MemoryBudgetError,
    NonFiniteError,
    OperatorError,
    PartitionError,
    UnsupportedModelError,
)
from tests.support.cases import CASES
from tests.support.networks import OnceDifferentiable, randomized


def _objective(name="LayerNorm and GELU", **options):
    case = CASES[name]
    return Objective(case.model(), case.batches((6, 3)), **{**case.options, **options})


@functools.cache
def _dense(name="LayerNorm and GELU"):
    """The Hessian of a case, and its dense matrix."""
    H = HessianOperator(_objective(name))
    return H, H.to_dense()


def _difference_of_gradients(objective, direction, h=1e-5):
    """H v by central differences of the gradient, over the whole loader."""
    state = objective.state()
    up, down = (
        objective.gradient({name: state[name] + sign * h * direction[name] for name in state}) for sign in (1, -1)
    )
    return {name: (up[name] - down[name]) / (2 * h) for name in state}


@pytest.mark.check
@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "tied weights"])
def test_dense_hessian_equals_differences_of_the_gradient(name):
    H, dense = _dense(name)
    units = torch.eye(H.shape[1], dtype=torch.float64)
    # Differences are slow: of the larger networks they give every fourth column.
    some = slice(0, None, 1 if len(units) < 100 else 4)
    differences = [_difference_of_gradients(H.objective, H.unflatten(unit)) for unit in units[some]]
    expected = torch.stack([H.flatten(difference) for difference in differences], dim=1)
    torch.testing.assert_close(dense[:, some], expected, rtol=1e-6, atol=1e-8)
    # By products it is not symmetric by construction.
    products = H @ units
    torch.testing.assert_close(dense, products, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(products, products.T, rtol=1e-9, atol=1e-11)


@pytest.mark.check(after=2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_product_equals_a_difference_of_gradients(case):
    objective = Objective(case.model(), case.batches(), **case.options)
    direction = {
        name: torch.sin(torch.arange(tensor.numel()).double()).view_as(tensor)
        for name, tensor in objective.state().items()
    }
    expected = _difference_of_gradients(objective, direction)
    for name, product in (HessianOperator(objective) @ direction).items():
        torch.testing.assert_close(product, expected[name], rtol=1e-6, atol=1e-8)


def test_vectors_matrices_and_states_agree():
    H, dense = _dense()
    n = H.shape[0]
    V = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(H @ V, dense @ V)
    torch.testing.assert_close(H @ V[:, 0], dense @ V[:, 0])
    as_state = H @ H.unflatten(V[:, 0])
    torch.testing.assert_close(H.flatten(as_state), dense @ V[:, 0])
    assert (H @ V.float()).dtype == torch.float32
    assert (H @ V[:, :0]).shape == (n, 0)


def test_sparse_direction_equals_its_dense_filling():
    objective = _objective("conv, interpolate")
    segment = Segment(CASES["conv, interpolate"].model(0), CASES["conv, interpolate"].model(3))
    H = HessianOperator(objective)
    sparse = segment.directions()["conv2"]
    filled = {name: sparse.get(name, torch.zeros_like(tensor)) for name, tensor in objective.state().items()}
    for name, tensor in (H @ sparse).items():
        torch.testing.assert_close(tensor, (H @ filled)[name])


@pytest.mark.check
def test_blocks_are_blocks_of_the_whole():
    H, dense = _dense("conv, interpolate")
    objective = H.objective
    positions, start = {}, 0
    for name, tensor in objective.state().items():
        positions[name] = range(start, start := start + tensor.numel())
    rows = [i for name in objective.state() if name in H.partition.entries("conv1") for i in positions[name]]
    columns = [i for name in objective.state() if name in H.partition.entries("fc") for i in positions[name]]

    block = H.block("conv1", "fc")
    assert block.shape == (len(rows), len(columns))
    torch.testing.assert_close(block.to_dense(), dense[rows][:, columns])
    torch.testing.assert_close(block.transposed().to_dense(), dense[columns][:, rows])
    torch.testing.assert_close(H.block("fc").to_dense(), dense[columns][:, columns])
    torch.testing.assert_close(HessianOperator(objective, layers="fc").to_dense(), dense[columns][:, columns])
    union = sorted(rows + columns)
    torch.testing.assert_close(HessianOperator(objective, layers=["fc", "conv1"]).to_dense(), dense[union][:, union])


def _layer_mask(H):
    """Which coordinates of the whole network belong to one layer."""
    layers = [H.partition.layer_of(name) for name, tensor in H.state.items() for _ in range(tensor.numel())]
    return torch.tensor([[a == b for b in layers] for a in layers])


@pytest.mark.check(after=1)
@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "tied weights", "LSTM"])
def test_block_diagonal_keeps_the_layers_own_blocks_and_drops_the_rest(name):
    H, dense = _dense(name)
    mask = _layer_mask(H)
    assert dense[~mask].abs().max() > 1e-3, "the case has nothing to drop"
    D = H.block_diagonal()
    kept = torch.where(mask, dense, 0.0)
    torch.testing.assert_close(D.to_dense(), kept, rtol=1e-10, atol=1e-14)
    V = torch.randn(H.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(D.matmat(V), kept @ V, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(H.matmat(V), dense @ V, rtol=1e-10, atol=1e-14)


def test_blocks_of_the_block_diagonal():
    H = HessianOperator(_objective("conv, interpolate"))
    D, layer = H.block_diagonal(), H.block("fc").to_dense()
    torch.testing.assert_close(D.block("fc").to_dense(), layer)
    assert D.block("fc", "conv1").shape == H.block("fc", "conv1").shape
    assert not D.block("fc", "conv1").to_dense().any()
    pair = H.block(["conv1", "fc"], ["fc", "conv2"]).block_diagonal().to_dense()
    n = len(layer)
    torch.testing.assert_close(pair[-n:, -n:], layer)
    assert not pair[:-n].any() and not pair[:, :-n].any()
    tensors = HessianOperator(_objective("conv, interpolate"), partition="tensor").block_diagonal()
    parts = tensors.block(["fc.weight", "fc.bias"]).to_dense()
    assert not parts[:12, 12:].any() and not parts[12:, :12].any()
    torch.testing.assert_close(parts[:12, :12], layer[:12, :12])
    assert D.to_scipy().shape == H.shape


@pytest.mark.check
@pytest.mark.parametrize("name", ["conv, interpolate", "attention"])
def test_diagonal_is_that_of_the_dense_matrix(name):
    H, dense = _dense(name)
    torch.testing.assert_close(H.diagonal(), dense.diagonal(), rtol=1e-10, atol=1e-14)
    layer = H.partition.names[-1]
    torch.testing.assert_close(H.block(layer).diagonal(), H.block(layer).to_dense().diagonal(), rtol=1e-10, atol=1e-14)


def test_a_block_between_layers_has_no_diagonal():
    with pytest.raises(OperatorError, match="between two layers has no diagonal"):
        HessianOperator(_objective("conv, interpolate")).block("conv1", "fc").diagonal()


def test_a_product_of_any_kind_visits_the_loader_once():
    class Counting(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    case = CASES["conv, interpolate"]
    loader = Counting(case.batches())
    H = HessianOperator(Objective(case.model(), loader))
    for operator in (H, H.block("conv1", "fc"), H.block_diagonal()):
        operator.matmat(torch.ones(operator.shape[1], 4))
    assert loader.passes == 3


def test_an_operator_knows_its_device():
    objective = _objective()
    assert HessianOperator(objective).block("0").device == objective.device


@pytest.mark.check
def test_scipy_finds_the_dense_eigenvalues():
    H, dense = _dense()
    expected = np.linalg.eigvalsh(dense.numpy())
    np.testing.assert_allclose(eigsh(H.to_scipy(), k=3, which="LA")[0], expected[-3:], rtol=1e-8)
    np.testing.assert_allclose(eigsh(H.to_scipy(), k=2, which="SA")[0], expected[:2], rtol=1e-6)


def test_scipy_sees_rectangular_blocks_and_their_transpose():
    block = HessianOperator(_objective("conv, interpolate")).block("conv1", "fc")
    dense, scipy_block = block.to_dense().numpy(), block.to_scipy()
    x, y = np.arange(dense.shape[1]) / 7.0, np.arange(dense.shape[0]) / 9.0
    np.testing.assert_allclose(scipy_block @ x, dense @ x, rtol=1e-10)
    np.testing.assert_allclose(scipy_block.H @ y, dense.T @ y, rtol=1e-10)
    np.testing.assert_allclose(scipy_block @ np.eye(dense.shape[1]), dense, rtol=1e-10, atol=1e-14)


def test_a_state_moves_the_operator():
    case = CASES["LayerNorm and GELU"]
    there = HessianOperator(_objective(), case.model(7).state_dict()).to_dense()
    torch.testing.assert_close(there, HessianOperator(Objective(case.model(7), case.batches((6, 3)))).to_dense())
    assert not torch.allclose(there, _dense()[1])


def test_a_hessian_too_large_is_refused_with_its_size():
    H = HessianOperator(_objective())
    n = H.shape[0]
    size = n * n * 8 / 2**30
    with pytest.raises(
        MemoryBudgetError, match=rf"{n} × {n} Hessian takes {size:.3g} GiB.*memory_gib=1e-06.*H.to_scipy"
    ):
        H.to_dense(memory_gib=1e-6)


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (torch.ones(7), r"shape \(7,\); expected a tensor of shape \(\d+,\)"),
        (torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
        (3.0, "type float"),
        ({"0.wait": torch.ones(6, 5)}, "no entry '0.wait': did you mean '0.weight'"),
    ],
)
def test_bad_operands_are_refused(operand, message):
    with pytest.raises(DirectionError, match=message):
        HessianOperator(_objective()) @ operand


def test_directions_along_other_layers_are_refused():
    H = HessianOperator(_objective("conv, interpolate"))
    direction = {"fc.bias": torch.ones_like(H.state["fc.bias"])}
    with pytest.raises(DirectionError, match=r"outside the operator's columns: \['fc.bias'\]"):
        H.block("conv1") @ direction
    assert list(H.block("conv1", "fc") @ direction) == list(H.block("conv1").rows)


def test_a_direction_may_name_a_tied_parameter_otherwise():
    H = HessianOperator(_objective("tied weights"))
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = H @ {"encoder.weight": weight}
    for direction in ({"decoder.weight": weight}, {"decoder.weight": weight, "encoder.weight": weight.clone()}):
        torch.testing.assert_close(H @ direction, expected, rtol=0, atol=0)
    with pytest.raises(DirectionError, match=r"'decoder\.weight' and 'encoder\.weight' are one parameter"):
        H @ {"encoder.weight": weight, "decoder.weight": 2 * weight}


def test_integer_operands_are_refused():
    H = HessianOperator(_objective())
    with pytest.raises(DirectionError, match="int64.*floating-point"):
        H @ torch.ones(H.shape[1], dtype=torch.int64)


def test_unknown_layers_get_a_suggestion():
    with pytest.raises(PartitionError, match="no layer 'fd': did you mean 'fc'"):
        HessianOperator(_objective("conv, interpolate"), layers=["fd"])


def test_a_state_may_hold_more_than_moves():
    case = CASES["conv, batch"]
    objective = Objective(case.model(), case.batches(), batch_norm="batch")
    full = HessianOperator(objective, case.model(3).state_dict())
    assert full.shape == HessianOperator(objective).shape
    moved = Objective(case.model(3), case.batches(), batch_norm="batch")
    v = torch.ones(full.shape[1], dtype=torch.float64)
    torch.testing.assert_close(full @ v, HessianOperator(moved) @ v)


def test_values_that_are_not_finite_are_named():
    case = CASES["LayerNorm and GELU"]
    batches = case.batches()
    batches[1][0][0, 0] = torch.nan
    H = HessianOperator(Objective(case.model(), batches))
    with pytest.raises(NonFiniteError, match=r"loss is nan at batch 1 \(6 examples\)"):
        H @ torch.ones(H.shape[1])
    with pytest.raises(NonFiniteError, match="Entry '0.bias' of the state has 1 of 6 values"):
        HessianOperator(_objective(), {"0.bias": torch.tensor([0, 0, torch.inf, 0, 0, 0])})
    with pytest.raises(NonFiniteError, match="Entry '0.weight' of the vector has 1 of 30"):
        H @ torch.cat([torch.tensor([torch.nan]), torch.ones(H.shape[1] - 1)])


def test_an_operation_without_a_second_derivative_is_said_so():
    # Where the loss ends in the operation its gradient's graph has no mark, and half of the Hessian is missing.
    for power in (1, 2):
        loss_fn = lambda out, _, power=power: OnceDifferentiable.apply(out).pow(power).mean()  # noqa: E731
        objective = _objective(loss_fn=loss_fn, witness=False)
        with pytest.raises(UnsupportedModelError, match="differentiated twice.*marked once_differentiable"):
            HessianOperator(objective) @ torch.ones(HessianOperator(objective).shape[1])
    with pytest.raises(UnsupportedModelError, match="marked once_differentiable"):
        project_hessian(objective, {}, [{"0.bias": torch.ones(6)}])

    bag = torch.nn.Sequential(torch.nn.EmbeddingBag(5, 3), torch.nn.Linear(3, 2))
    objective = Objective(bag, [(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))])
    with (
        pytest.raises(UnsupportedModelError, match="cannot be differentiated twice: .*_embedding_bag"),
        pytest.warns(FallbackWarning, match=r"Long\. Falling back on one Hessian-vector product"),
    ):
        project_hessian(objective, {}, [{"0.weight": torch.ones(5, 3)}])


def test_products_that_are_not_finite_are_refused():
    model = torch.nn.Linear(2, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    batches = [(torch.ones(3, 2), torch.ones(3))]
    H = HessianOperator(Objective(model, batches, loss_fn=lambda out, _: out.abs().pow(1.5).mean()))
    with pytest.raises(NonFiniteError, match="Hessian has products that are not finite.*square root at zero"):
        H @ torch.ones(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_on_a_gpu_equal_those_on_a_cpu(case, dtype):
    # In single precision far nearer than with ten bits of mantissa, which TF32 keeps.
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 2e-5}
    H = HessianOperator(Objective(case.model(), case.batches(), **case.options))
    there = HessianOperator(Objective(case.model(), case.batches(), device="cuda", dtype=dtype, **case.options))
    V = torch.randn(H.shape[1], 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for on_cpu, on_gpu in ((H, there), (H.block_diagonal(), there.block_diagonal())):
        product = on_gpu.matmat(V.cuda())
        assert product.device.type == on_gpu.device.type == "cuda"
        torch.testing.assert_close(product.cpu(), on_cpu.matmat(V), **tolerance)


@pytest.mark.parametrize("make", [HessianOperator.to_dense, HessianOperator.diagonal])
def test_long_calls_show_their_batches_if_asked_to(make, capsys):
    operator = HessianOperator(_objective())
    make(operator, progress=False)
    make(operator)
    assert not capsys.readouterr().err
    make(operator, progress=True)
    assert "Hessian: " in (shown := capsys.readouterr().err)
    assert "0/2" in shown


def test_running_statistics_can_be_left_out():
    network = randomized(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)))
    x, y = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 3
    objective = Objective(network.double(), [(x, y)])
    H, whole = HessianOperator(objective, statistics=False), HessianOperator(objective)
    names = [name for name, _ in network.named_parameters()]
    assert list(H.rows) == list(H.columns) == names
    assert set(whole.rows) - set(names) == {"1.running_mean", "1.running_var"}

    def loss(*tensors):
        return F.cross_entropy(functional_call(network.eval(), dict(zip(names, tensors, strict=True)), (x,)), y)

    parameters = tuple(parameter.detach() for parameter in network.parameters())
    blocks = torch.autograd.functional.hessian(loss, parameters)
    sizes = [parameter.numel() for parameter in parameters]
    rows = [torch.cat([block.reshape(n, -1) for block in row], 1) for n, row in zip(sizes, blocks, strict=True)]
    torch.testing.assert_close(H.to_dense(), torch.cat(rows), rtol=1e-9, atol=1e-11)
    # Blocks are of the same coordinates.
    (layer,) = {layer for layer in H.partition.names if "1.running_var" in H.partition.entries(layer)}
    for block in (H.block(layer), H.block_diagonal(), H.block(layer).transposed()):
        assert not {"1.running_mean", "1.running_var"} & {*block.rows, *block.columns}
    dense = H.to_dense()
    own = H.block(layer)
    places = torch.cat([torch.arange(sum(sizes)).split(sizes)[names.index(name)] for name in own.rows])
    torch.testing.assert_close(own.to_dense(), dense[places][:, places], rtol=1e-9, atol=1e-12)


def test_a_state_in_any_order_is_flattened_in_that_of_the_operator():
    case = CASES["LayerNorm and GELU"]
    H = HessianOperator(Objective(case.model(), case.batches()))
    vector = torch.randn(H.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = H.unflatten(vector)
    torch.testing.assert_close(H.flatten(dict(reversed(state.items()))), vector)
    first, *others = state
    with pytest.raises(DirectionError, match=f"Entry '{first}' is missing"):
        H.flatten({name: state[name] for name in others})
    with pytest.raises(DirectionError, match="no entry 'other'"):
        H.flatten({**state, "other": vector})
    with pytest.raises(DirectionError, match="has shape"):
        H.flatten({**state, first: vector})
