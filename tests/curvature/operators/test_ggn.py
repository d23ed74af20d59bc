"""Claim: a GGNOperator is JᵀSJ, checked against dense Jacobians, the Fisher information, the Hessian and curvlinops."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call, hessian, jacrev

from lmc_curvature import GGNOperator, HessianOperator, Objective
from lmc_curvature.errors import (
    LossError,
    MemoryBudgetError,
    NonFiniteError,
    PartitionError,
    UnsupportedModelError,
)
from tests.support.cases import CASES
from tests.support.networks import OnceDifferentiable, untouched

# All of them together take seconds.


def _classifier():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def _convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)
    )


def _sizes(total, sizes=(6, 5, 2)):
    assert sum(sizes) == total
    return sizes


def _data(shape, target):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(13, *shape, generator=generator, dtype=torch.float64)
    y = {
        "classes": torch.randint(4, (13,), generator=generator),
        "values": torch.randn(13, 4, generator=generator, dtype=torch.float64),
        "bits": torch.randint(2, (13, 4), generator=generator).double(),
    }[target]
    return x, y, list(zip(x.split(_sizes(13)), y.split(_sizes(13)), strict=True))


LOSSES = {
    "cross-entropy": (F.cross_entropy, "classes"),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), "classes"),
    "mse": (F.mse_loss, "values"),
    "huber, concave nowhere": (F.huber_loss, "values"),
    "bce": (F.binary_cross_entropy_with_logits, "bits"),
    "not convex": (lambda out, y: (out - y).sin().mean(), "values"),
}


def _dense_by_jacobians(model, x, y, loss_fn):
    """(1/n) Σ J_iᵀ S_i J_i from whole Jacobians and Hessians, an example at a time."""
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    total = 0
    for i in range(len(x)):
        example, target = x[i : i + 1], y[i : i + 1]
        J = jacrev(lambda state, example=example: functional_call(model, state, (example,)))(state)
        J = torch.cat([part.flatten(2).squeeze(0) for part in (J[name].unsqueeze(-1) for name in state)], dim=1)
        output = model(example).detach()
        S = hessian(lambda out, target=target: loss_fn(out, target))(output).reshape(4, 4)
        total = total + J.T @ S @ J
    return total / len(x)


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("loss_fn", "target"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("make", "shape"), [(_classifier, (5,)), (_convolutional, (2, 5, 5))], ids=["mlp", "conv"])
def test_dense_matrix_is_made_of_jacobians(make, shape, loss_fn, target):
    torch.manual_seed(0)
    model = make().double()
    x, y, batches = _data(shape, target)
    G = GGNOperator(Objective(model, batches, loss_fn=loss_fn))
    torch.testing.assert_close(G.to_dense(), _dense_by_jacobians(model, x, y, loss_fn).detach(), rtol=1e-10, atol=1e-13)


def test_it_is_the_fisher_information_of_a_classifier():
    torch.manual_seed(0)
    model = _classifier().double()
    x, _, batches = _data((5,), "classes")
    G = GGNOperator(Objective(model, batches))
    fisher = 0
    for example in x:
        log_p = F.log_softmax(model(example), 0)
        for c in range(4):
            score = torch.autograd.grad(log_p[c], list(model.parameters()), retain_graph=True)
            score = torch.cat([part.flatten() for part in score])
            fisher = fisher + log_p[c].exp().detach() * torch.outer(score, score) / len(x)
    torch.testing.assert_close(G.to_dense(), fisher, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("loss_fn", "target"), LOSSES.values(), ids=LOSSES)
def test_it_is_the_hessian_of_a_network_that_is_linear_in_its_state(loss_fn, target):
    torch.manual_seed(0)
    _, _, batches = _data((5,), target)
    objective = Objective(nn.Linear(5, 4).double(), batches, loss_fn=loss_fn)
    torch.testing.assert_close(GGNOperator(objective).to_dense(), HessianOperator(objective).to_dense())


@pytest.mark.check(after=3)
@pytest.mark.parametrize("name", [name for name in CASES if name != "dict batches"])
def test_last_layer_blocks_are_those_of_the_hessian(name):
    # The output is linear in the last layer, whatever comes before it.
    case = CASES[name]
    objective = Objective(case.model(), case.batches(), **case.options)
    G, H = GGNOperator(objective, partition="module"), HessianOperator(objective, partition="module")
    last = "decoder" if name == "tied weights" else G.partition.names[-1]
    torch.testing.assert_close(G.block(last).to_dense(), H.block(last).to_dense(), rtol=1e-9, atol=1e-12)
    V = torch.randn(G.shape[1], 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (V * G.matmat(V)).sum() > 0
    if name != "attention":
        assert not torch.allclose(G.matmat(V), H.matmat(V), rtol=1e-2)


def test_it_is_the_hessian_where_every_example_is_fitted():
    torch.manual_seed(0)
    model = _classifier().double()
    x, _, _ = _data((5,), "values")
    objective = Objective(model, [(x, model(x).detach())], loss_fn=F.mse_loss)
    torch.testing.assert_close(GGNOperator(objective).to_dense(), HessianOperator(objective).to_dense())


@pytest.mark.check
def test_blocks_vectors_and_states_agree():
    case = CASES["conv, interpolate"]
    objective = Objective(case.model(), case.batches((6, 3)))
    G = GGNOperator(objective)
    dense = G.to_dense()
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12
    V = torch.randn(G.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(G @ V, dense @ V)
    torch.testing.assert_close(G @ V[:, 0], dense @ V[:, 0])
    torch.testing.assert_close(G.flatten(G @ G.unflatten(V[:, 0])), dense @ V[:, 0])
    torch.testing.assert_close(G.diagonal(), dense.diagonal())
    layers = [G.partition.layer_of(name) for name, tensor in G.state.items() for _ in range(tensor.numel())]
    inside = torch.tensor([[a == b for b in layers] for a in layers])
    torch.testing.assert_close(G.block_diagonal().to_dense(), torch.where(inside, dense, 0.0))
    rows, columns = (torch.tensor([layer == name for layer in layers]) for name in ("fc", "conv1"))
    torch.testing.assert_close(G.block("fc", "conv1").to_dense(), dense[rows][:, columns])
    torch.testing.assert_close(GGNOperator(objective, layers="fc").to_dense(), dense[rows][:, rows])
    largest = torch.linalg.eigvalsh(dense)[-1].item()
    assert eigsh(G.to_scipy(), k=1, which="LA")[0] == pytest.approx(largest, rel=1e-8)


def test_a_state_moves_the_operator():
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), case.batches())
    there = GGNOperator(objective, case.model(7).state_dict()).to_dense()
    torch.testing.assert_close(there, GGNOperator(Objective(case.model(7), case.batches())).to_dense())
    assert not torch.allclose(there, GGNOperator(objective).to_dense())


def test_curvlinops_agrees():
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    torch.manual_seed(0)
    model = _convolutional().double()
    _, _, batches = _data((2, 5, 5), "classes")
    G = GGNOperator(Objective(model, batches))
    peer = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    v = torch.randn(G.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(G @ v, peer @ v, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_linear_in_the_output_has_none():
    _, _, batches = _data((5,), "values")
    objective = Objective(_classifier().double(), batches, loss_fn=lambda out, y: (out * y).mean())
    with pytest.warns(UserWarning, match="exactly zero"):
        assert not GGNOperator(objective).to_dense().any()


def _hinge(output, target):
    return (1 - output * (2 * target - 1)).relu().mean()


@pytest.mark.parametrize(
    ("network", "loss_fn", "target"),
    [
        (nn.LogSoftmax(1), F.nll_loss, "classes"),
        (nn.LogSoftmax(1), lambda out, y: F.kl_div(out, y.softmax(1), reduction="batchmean"), "values"),
        (nn.Identity(), F.l1_loss, "values"),
        (nn.Identity(), _hinge, "bits"),
    ],
    ids=["nll", "kl", "l1", "hinge"],
)
def test_a_loss_without_a_second_derivative_in_the_output_is_warned_of_once(network, loss_fn, target):
    _, _, batches = _data((5,), target)
    objective = Objective(nn.Sequential(_classifier(), network).double(), batches, loss_fn=loss_fn)
    with pytest.warns(UserWarning, match="is exactly zero: .* end in its logits, and use cross_entropy") as caught:
        G = GGNOperator(objective)
        for _ in range(2):
            assert not (G @ torch.ones(G.shape[1])).any()
        GGNOperator(objective).block("0.0").to_dense()
    assert sum("exactly zero" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_are_not_warned_of(name):
    loss_fn, target = LOSSES[name]
    _, _, batches = _data((5,), target)
    G = GGNOperator(Objective(_classifier().double(), batches, loss_fn=loss_fn))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (G @ torch.ones(G.shape[1])).any()


def test_nothing_is_said_where_every_example_is_fitted():
    """There the slope is zero, too."""
    model = _classifier().double()
    x, _, _ = _data((5,), "values")
    G = GGNOperator(Objective(model, [(x, model(x).detach())], loss_fn=F.l1_loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not (G @ torch.ones(G.shape[1])).any()


def test_nothing_is_changed():
    case = CASES["conv, batch"]
    model = case.model()
    with untouched(model):
        G = GGNOperator(Objective(model, case.batches(), batch_norm="batch"))
        G @ torch.ones(G.shape[1], dtype=torch.float64)


def test_a_batch_loss_is_refused():
    case = CASES["dict batches"]
    with pytest.raises(
        LossError, match=r"BatchLoss calls the network itself.*loss_fn\(output, target\).*HessianOperator"
    ):
        GGNOperator(Objective(case.model(), case.batches(), **case.options))


def test_an_output_that_is_not_one_tensor_is_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x):
            return self.fc(x), x

    _, _, batches = _data((5,), "classes")
    objective = Objective(Pair().double(), batches, loss_fn=lambda out, y: F.cross_entropy(out[0], y))
    G = GGNOperator(objective)
    with pytest.raises(UnsupportedModelError, match="output is a tuple of length 2; .*defined for one tensor"):
        G @ torch.ones(G.shape[1])


def test_a_network_that_draws_random_numbers_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(())

    _, _, batches = _data((5,), "classes")
    G = GGNOperator(Objective(nn.Sequential(Noisy(5, 4)).double(), batches))
    with pytest.raises(UnsupportedModelError, match="Noisy.*draws random numbers"):
        G @ torch.ones(G.shape[1])


@pytest.mark.parametrize("power", [1, 2], ids=["at the end", "before the end"])
def test_an_operation_without_a_second_derivative_is_said_so(power):
    def loss(output, target):
        return OnceDifferentiable.apply(output).pow(power).mean()

    _, _, batches = _data((5,), "classes")
    objective = Objective(_classifier().double(), batches, loss_fn=loss, witness=False)
    G = GGNOperator(objective)
    with pytest.raises(UnsupportedModelError, match="marked once_differentiable"):
        G @ torch.ones(G.shape[1])


def test_bad_input_is_named():
    x, y, batches = _data((5,), "classes")
    G = GGNOperator(Objective(_classifier().double(), batches))
    with pytest.raises(MemoryBudgetError, match=r"A dense 64 × 64 Gauss-Newton matrix takes 3.05e-05 GiB"):
        G.to_dense(memory_gib=1e-9)
    with pytest.raises(PartitionError, match="no layer '3'"):
        G.block("3")
    x[0, 0] = torch.nan
    G = GGNOperator(Objective(_classifier().double(), [(x, y)]))
    with pytest.raises(NonFiniteError, match="loss is nan at batch 0"):
        G @ torch.ones(G.shape[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in CASES if name != "dict batches"])
def test_products_on_a_gpu_equal_those_on_a_cpu(name):
    case = CASES[name]
    G = GGNOperator(Objective(case.model(), case.batches(), **case.options))
    there = GGNOperator(Objective(case.model(), case.batches(), device="cuda", **case.options))
    V = torch.randn(G.shape[1], 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(there.matmat(V.cuda()).cpu(), G.matmat(V), rtol=1e-8, atol=1e-10)
