"""Claim: a dense block is the Hessian's, by either road, checked against torch.func, closed forms and products."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from lmc_curvature import BatchLoss, HessianOperator, Objective
from lmc_curvature.curvature.blocks import METHODS, cross_layer_hessian, layer_hessian
from lmc_curvature.curvature.blocks.affine import AffineMap
from lmc_curvature.curvature.products import BatchGradient
from lmc_curvature.errors import (
    FallbackWarning,
    MemoryBudgetError,
    NonFiniteError,
    OptionError,
    PartitionError,
    UnsupportedModelError,
)
from tests.support.cases import CASES
from tests.support.networks import untouched

# All of them together take seconds.


class Tokens(nn.Module):
    """Linear layers at every token, and tokens that look at each other in between."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 3, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
        return self.out(torch.tanh(weights @ self.value(x))).mean(1)


class Images(nn.Module):
    """Convolutions with strides, dilation and padding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=1)
        self.second = nn.Conv2d(3, 2, 2, dilation=2, bias=False)
        self.fc = nn.Linear(2, 3)

    def forward(self, x):
        return self.fc(F.softplus(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


class Branches(nn.Module):
    """Two layers that do not feed each other, in an order that is not that of their names, and one that both feed."""

    def __init__(self):
        super().__init__()
        self.late, self.early, self.top = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 3)

    def forward(self, x):
        early = torch.sin(self.early(x))
        return self.top(input=early * torch.tanh(self.late(x)) + early)


class Repeated(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.again, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.fc(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))


class InPlace(nn.Module):
    """Outputs that are changed in place, and an input that goes on elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x).mul_(0.7).tanh()
        return self.third(self.second(x).add_(x).sigmoid())


def _mlp(bias=True):
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3))


VECTOR, TOKENS, IMAGES = (4,), (3, 4), (2, 5, 4)
NETWORKS = {
    "mlp": (_mlp, VECTOR),
    "mlp without bias": (lambda: _mlp(bias=False), VECTOR),
    "deep linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), VECTOR),
    "one layer at each of three positions": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten()), TOKENS),
    "tokens": (Tokens, TOKENS),
    "images": (Images, IMAGES),
    "branches": (Branches, VECTOR),
    "repeated": (Repeated, VECTOR),
    "tied": (Tied, VECTOR),
    "in place": (InPlace, VECTOR),
}
WITHOUT_STRUCTURE = ("repeated", "tied")


def _setting(name, sizes=(5, 3), seed=0):
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        batches = [(torch.randn(n, *shape, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]
    return model, batches


def _dense(model, batches, loss_fn=F.cross_entropy):
    """Blocks between all parameters of the mean loss, by torch.func."""
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def loss(point):
        values = [len(y) * loss_fn(functional_call(model, point, x), y) for x, y in batches]
        return sum(values) / sum(len(y) for _, y in batches)

    found = hessian(loss)(parameters)
    return {
        (a, b): block.reshape(parameters[a].numel(), parameters[b].numel())
        for a, row in found.items()
        for b, block in row.items()
    }


def _assembled(blocks, rows, columns):
    return torch.cat([torch.cat([blocks[a, b] for b in columns], 1) for a in rows])


def _count(monkeypatch):
    """Count the Hessian-vector products that are made from now on; through a convolution they are made one by one."""
    made, product = [], BatchGradient.product

    def counted(self, *args, **options):
        made.append(1)
        return product(self, *args, **options)

    monkeypatch.setattr(BatchGradient, "product", counted)
    return made


@pytest.mark.check(after=1)
@pytest.mark.filterwarnings("error::lmc_curvature.errors.FallbackWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name, method in itertools.product(NETWORKS, METHODS)
        if method != "structured" or name not in WITHOUT_STRUCTURE
    ],
)
def test_blocks_of_all_pairs_of_layers_equal_torch_func(name, method):
    model, batches = _setting(name)
    expected = _dense(model, batches)
    objective = Objective(model, batches)
    groups = HessianOperator(objective).partition.groups
    for a, b in itertools.product(groups, repeat=2):
        found = cross_layer_hessian(objective, None, a, b, method=method)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, _assembled(expected, groups[a], groups[b]), rtol=1e-9, atol=1e-12)
        if a == b:
            torch.testing.assert_close(layer_hessian(objective, None, a, method=method), found, rtol=0, atol=0)


@pytest.mark.check(after=1)
@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_a_module_is_a_layer_too(method):
    model, batches = _setting("mlp")
    expected = _dense(model, batches)
    objective = Objective(model, batches)
    for a, b in itertools.product(["0.bias", "2.weight", "2.bias", "4.weight"], repeat=2):
        found = cross_layer_hessian(objective, None, a, b, partition="tensor", method=method)
        torch.testing.assert_close(found, expected[a, b], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_several_modules(method):
    model, batches = _setting("mlp")
    layers = {"outer": [r"^[04]\."], "inner": [r"^2\."]}
    objective = Objective(model, batches)
    groups = HessianOperator(objective, partition=layers).partition.groups
    expected = _dense(model, batches)
    for a, b in itertools.product(groups, repeat=2):
        found = cross_layer_hessian(objective, None, a, b, partition=layers, method=method)
        torch.testing.assert_close(found, _assembled(expected, groups[a], groups[b]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_softmax_regression_has_a_closed_form(method, dtype, tolerance):
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 4
    objective = Objective(model, [(x[:13], y[:13]), (x[13:], y[13:])], dtype=dtype)
    found = layer_hessian(objective, None, "weight", method=method, partition=lambda _: "weight")

    state = {name: tensor.double() for name, tensor in objective.state().items()}
    x = x.to(dtype).double()
    p = torch.softmax(x @ state["weight"].T + state["bias"], 1)
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    features = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)
    expected = torch.einsum("nab,nc,nd->acbd", outer, features, features) / 20
    order = [7 * o + c for o in range(4) for c in range(6)] + [7 * o + 6 for o in range(4)]
    expected = expected.reshape(28, 28)[order][:, order]
    assert torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected)


@pytest.mark.check
@pytest.mark.parametrize(
    "name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "attention", "dict batches"]
)
def test_normalisation_and_attention_agree_with_products(name):
    case = CASES[name]
    objective = Objective(case.model(), case.batches((6, 3)), **case.options)
    H = HessianOperator(objective)
    whole, place = H.to_dense(), dict.fromkeys(H.partition.names, torch.tensor([], dtype=torch.long))
    positions = torch.arange(len(whole)).split([tensor.numel() for tensor in objective.state().values()])
    for entry, position in zip(objective.state(), positions, strict=True):
        place[H.partition.layer_of(entry)] = torch.cat([place[H.partition.layer_of(entry)], position])
    for a, b in itertools.combinations_with_replacement(H.partition.names, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = cross_layer_hessian(objective, None, a, b)
        torch.testing.assert_close(found, whole[place[a]][:, place[b]], rtol=1e-9, atol=1e-12)


@pytest.mark.check
def test_normalisation_beside_a_convolution_gets_products(monkeypatch):
    case = CASES["conv, interpolate"]
    objective = Objective(case.model(), case.batches((9,)))
    H = HessianOperator(objective).block("conv1", "conv2")
    expected = H.to_dense()
    made = _count(monkeypatch)
    found = cross_layer_hessian(objective, None, "conv1", "conv2", method="structured")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # Two to compare with, and one for each weight, bias, mean and variance of four channels, of both layers.
    assert len(made) == 2 + 2 * 4 * 4


def test_a_layer_below_batch_statistics_has_no_structure_and_one_above_has():
    case = CASES["conv, batch"]
    objective = Objective(case.model(), case.batches(), batch_norm="batch")
    with pytest.raises(OptionError, match="at batch 0, examples have a part in each other's loss above the layer"):
        layer_hessian(objective, None, "conv1", method="structured")
    expected = HessianOperator(objective).block("fc").to_dense()
    found = layer_hessian(objective, None, "fc", method="structured")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_examples_that_interact_in_a_later_batch_only():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.fc(x)
            return self.out(torch.tanh(x - x.mean(0)))

    # Of a single example there is nothing to interact with.
    _, batches = _setting("mlp", sizes=(1, 5, 4))
    objective = Objective(Centred().double(), batches)
    expected = HessianOperator(objective).block("fc").to_dense()
    torch.testing.assert_close(layer_hessian(objective, None, "fc"), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(OptionError, match="at batch 1, examples have a part"):
        layer_hessian(objective, None, "fc", method="structured")


class Siamese(nn.Module):
    """Multiplies the examples at some places by those at others."""

    def __init__(self, first, others):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first, self.others = first, others

    def forward(self, x):
        x = torch.tanh(self.fc(x))
        if len(x) == 8:
            x = x.index_put((torch.tensor(self.first),), x[self.first] * x[self.others])
        return self.out(x)


@pytest.mark.check(after=4)
@pytest.mark.parametrize(("first", "others"), [([0], [1]), ([4], [6]), ([7], [3]), ([0, 1, 2, 3], [4, 5, 6, 7])])
@pytest.mark.parametrize("layers", [("fc", "fc"), ("fc", "out"), ("out", "fc")])
def test_examples_that_interact_in_pairs(first, others, layers):
    # Nothing interacts in the first batch.
    _, batches = _setting("mlp", sizes=(2, 8, 5))
    objective = Objective(Siamese(first, others).double(), batches)
    a, b = layers
    expected = HessianOperator(objective).block(a, b).to_dense()
    torch.testing.assert_close(cross_layer_hessian(objective, None, a, b), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(OptionError, match="at batch 1, examples have a part"):
        cross_layer_hessian(objective, None, a, b, method="structured")


def test_a_module_called_twice_has_no_structure():
    model, batches = _setting("repeated")
    with pytest.raises(OptionError, match="at batch 0, the module of 'again.weight' is used 2 times, not once"):
        layer_hessian(Objective(model, batches), None, "again", method="structured")


def test_a_tied_weight_has_no_structure_and_the_biases_beside_it_have():
    model, batches = _setting("tied")
    objective = Objective(model, batches)
    with pytest.raises(OptionError, match=r"layer 'encoder.weight' has no nn.Linear .*\(not tied"):
        layer_hessian(objective, None, "encoder.weight", partition="tensor", method="structured")
    expected = HessianOperator(objective).block("encoder").to_dense()
    found = layer_hessian(objective, None, "encoder", method="structured")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _dense_block(model, batches, entries):
    """The block of some parameters, by torch without `vmap`, which some operations get wrong."""
    own = {name: dict(model.named_parameters())[name].detach() for name in entries}

    def loss(*values):
        point = {**dict(model.named_parameters()), **dict(zip(own, values, strict=True))}
        parts = [len(y) * F.cross_entropy(functional_call(model, point, x), y) for x, y in batches]
        return sum(parts) / sum(len(y) for _, y in batches)

    found = torch.autograd.functional.hessian(loss, tuple(own.values()))
    sizes = [tensor.numel() for tensor in own.values()]
    return torch.cat(
        [
            torch.cat([part.reshape(rows, columns) for part, columns in zip(row, sizes, strict=True)], 1)
            for row, rows in zip(found, sizes, strict=True)
        ]
    )


class Experts(nn.Module):
    """A layer that sees the examples of one sign alone, which may be none."""

    def __init__(self, *experts):
        super().__init__()
        self.experts, self.out = nn.ModuleList(experts), nn.Linear(3, 3)

    def forward(self, x):
        chosen = x.flatten(1)[:, 0] > 0
        h = x.new_zeros(len(x), 3)
        for mask, expert in zip((chosen, ~chosen), self.experts, strict=True):
            y = torch.tanh(expert(x[mask]))
            h[mask] = y.flatten(2).mean(2) if y.ndim == 4 else y.flatten(1, -2).mean(1) if y.ndim > 2 else y
        return self.out(h)


EXPERTS = {
    "vectors": (lambda: nn.Linear(4, 3), VECTOR),
    "tokens": (lambda: nn.Linear(4, 3), TOKENS),
    "images": (lambda: nn.Conv2d(2, 3, 2), IMAGES),
    "a normalisation beside": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), VECTOR),
}


def _experts(name, signs):
    """An expert for examples that begin with a positive number, one for the others, and batches of one sign each."""
    make, shape = EXPERTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Experts(make(), make()).double()
        xs = [torch.randn(4, *shape, dtype=torch.float64) for _ in signs]
        batches = [(x, torch.randint(3, (4,))) for x in xs]
    for sign, x in zip(signs, xs, strict=True):
        first = x.flatten(1)[:, 0]
        if sign:
            first.abs_().mul_(sign)
    return model, batches


@pytest.mark.check(after=4)
@pytest.mark.filterwarnings("error::lmc_curvature.errors.FallbackWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signs", [(1, -1), (-1, 0, 1), (-1, -1)])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_layer_without_examples_has_no_part_in_that_batch(name, signs, method):
    model, batches = _experts(name, signs)
    objective = Objective(model, batches)
    layer = "experts.0.0" if "beside" in name else "experts.0"
    expected = _dense_block(model, batches, HessianOperator(objective).block(layer).rows)
    assert bool(expected.any()) == (signs != (-1, -1))
    torch.testing.assert_close(layer_hessian(objective, None, layer, method=method), expected, rtol=1e-9, atol=1e-12)


def test_a_wrong_block_is_noticed_at_the_first_batch_that_has_a_part_in_it(monkeypatch):
    model, batches = _experts("vectors", (-1, 1))
    objective = Objective(model, batches)
    expected = HessianOperator(objective).block("experts.0").to_dense()
    features = AffineMap.features
    monkeypatch.setattr(AffineMap, "features", lambda self, *args, **options: 2 * features(self, *args, **options))
    with pytest.warns(FallbackWarning, match="At batch 1, the structured block .* is off by "):
        found = layer_hessian(objective, None, "experts.0")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Wayward(nn.Module):
    """A layer that is used once, and in batches of four examples in some other way."""

    def __init__(self, way=None):
        super().__init__()
        self.fc, self.out, self.way = nn.Linear(4, 4), nn.Linear(4, 3), way
        nn.init.eye_(self.fc.weight)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x) if len(x) != 4 else self.way(self.fc, x)))


WAYS = {
    "beside its module": (lambda fc, x: fc(x) + F.softplus(x @ fc.weight), "'fc.weight' is used 2 times"),
    "as a penalty at its minimum": (
        lambda fc, x: fc(x) + (fc.weight - torch.eye(4)).square().sum(),
        "'fc.weight' is used 2 times",
    ),
    "its bias beside its module": (lambda fc, x: fc(x) * fc.bias.exp(), "'fc.bias' is used 2 times"),
    "twice": (lambda fc, x: fc(torch.tanh(fc(x))), "the module of 'fc.weight' is used 2 times"),
    "without its module": (lambda fc, x: F.linear(x, fc.weight, fc.bias), "the module of 'fc.weight' is used 0 times"),
    "with other entries": (
        lambda fc, x: functional_call(fc, {"weight": 2 * fc.weight}, x),
        "the module of 'fc.weight' computes with something made of its entries",
    ),
    "with entries made of them": (
        lambda fc, x: functional_call(fc, {"weight": fc.weight.sin() + fc.weight}, x),
        "the module of 'fc.weight' computes with something",
    ),
}


@pytest.mark.check(after=3)
@pytest.mark.parametrize(("way", "reason"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("sizes", [(4, 3), (3, 5, 4, 2)])
@pytest.mark.parametrize("layers", [("fc", "fc"), ("fc", "out"), ("out", "fc")])
def test_a_layer_used_in_another_way_in_any_batch_is_noticed(way, reason, sizes, layers):
    torch.manual_seed(0)
    _, batches = _setting("mlp", sizes=sizes)
    model = Wayward(way).double()
    groups = {name: [f"{name}.weight", f"{name}.bias"] for name in ("fc", "out")}
    expected = _assembled(_dense(model, batches), *(groups[layer] for layer in layers))
    objective = Objective(model, batches)
    for method in ("auto", "products"):
        found = cross_layer_hessian(objective, None, *layers, method=method)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(OptionError, match=f"method='structured': at batch {sizes.index(4)}, {reason}"):
        cross_layer_hessian(objective, None, *layers, method="structured")


def test_a_weight_whose_copy_in_another_type_is_used_twice_is_noticed():
    torch.manual_seed(0)
    _, batches = _setting("mlp", sizes=(3, 4))
    model = Wayward(lambda fc, x: fc(x) + F.softplus(F.linear(x, fc.weight)))
    objective = Objective(model, [(x.float(), y) for x, y in batches])
    with torch.autocast("cpu"), pytest.raises(OptionError, match="at batch 1, 'fc.weight' is used 2 times"):
        layer_hessian(objective, None, "fc", method="structured")


def test_a_wrong_block_is_noticed(monkeypatch):
    model, batches = _setting("mlp")
    objective = Objective(model, batches)
    expected = HessianOperator(objective).block("2").to_dense()
    features = AffineMap.features
    monkeypatch.setattr(AffineMap, "features", lambda self, *args, **options: 2 * features(self, *args, **options))
    with pytest.warns(FallbackWarning, match="At batch 0, the structured block .* is off by "):
        found = layer_hessian(objective, None, "2")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(OptionError, match="method='structured': at batch 0, .* is off by"):
        layer_hessian(objective, None, "2", method="structured")


class WrongProduct(torch.autograd.Function):
    """A product whose backward pass is twice what it should be."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, 2 * gradient.T @ x


class ScaledBranch(nn.Module):
    """A branch that counts for a millionth beside another one."""

    def __init__(self, product):
        super().__init__()
        self.branch, self.fc, self.product = nn.Linear(4, 4, bias=False), nn.Linear(4, 3), product

    def forward(self, x):
        return self.fc(x + 1e-6 * torch.tanh(self.product(x, self.branch.weight)))


@pytest.mark.parametrize(
    ("layers", "caught"), [(("branch", "branch"), True), (("fc", "branch"), True), (("fc",) * 2, False)]
)
def test_a_wrong_derivative_in_a_layer_that_hardly_counts_is_noticed(layers, caught):
    _, batches = _setting("mlp")
    model = ScaledBranch(WrongProduct.apply).double()
    if caught:
        with pytest.raises(UnsupportedModelError, match="The slope of the loss along a random direction"):
            cross_layer_hessian(Objective(model, batches), None, *layers)
        with pytest.raises(UnsupportedModelError, match="The slope of the loss along a random direction"):
            HessianOperator(Objective(model, batches)).block(*layers).to_dense()
    right = ScaledBranch(F.linear).double()
    right.load_state_dict(model.state_dict())
    expected = _dense(right, batches)["fc.weight", "fc.weight"]
    found = cross_layer_hessian(Objective(right if caught else model, batches), None, "fc", "fc")
    torch.testing.assert_close(found[:12, :12], expected, rtol=1e-9, atol=1e-12)


def test_a_network_that_a_loss_calls_twice():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + model(batch[0].flip(1)).square().mean()

    model, batches = _setting("mlp")
    objective = Objective(model, batches, loss_fn=BatchLoss(loss))
    expected = HessianOperator(objective).block("2").to_dense()
    torch.testing.assert_close(layer_hessian(objective, None, "2"), expected, rtol=1e-9, atol=1e-12)


def test_a_linear_layer_takes_a_product_a_unit(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, (2, 3)), nn.Flatten())
    _, batches = _setting("mlp", sizes=(5,))
    objective = Objective(model.double(), batches)
    made = _count(monkeypatch)
    layer_hessian(objective, None, "0")
    # To compare with.
    assert len(made) == 2
    layer_hessian(objective, None, "0", method="products")
    assert len(made) == 2 + 30


def test_more_positions_than_features_take_products(monkeypatch):
    layers = [nn.Linear(2, 3), nn.Tanh(), nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 3, (5, 3)), nn.Flatten()]
    x, y = torch.randn(4, 5, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    objective = Objective(nn.Sequential(*layers).double(), [(x, y)])
    expected = layer_hessian(objective, None, "0", method="structured")
    made = _count(monkeypatch)
    torch.testing.assert_close(layer_hessian(objective, None, "0"), expected, rtol=1e-9, atol=1e-12)
    assert len(made) == 9


@pytest.mark.parametrize("method", ["structured", "products"])
def test_one_pass_over_uneven_batches_of_an_iterator(method):
    # More parameters than columns that a dense operator computes in one pass.
    make = lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)).double()  # noqa: E731
    torch.manual_seed(0)
    model = make()
    batches = [(torch.randn(n, 9, dtype=torch.float64), torch.randint(3, (n,))) for n in (7, 1, 4)]
    found = layer_hessian(Objective(model, iter(batches)), None, "0", method=method)
    joined = [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    expected = _assembled(_dense(model, joined), ["0.weight", "0.bias"], ["0.weight", "0.bias"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_state_moves_the_block():
    model, batches = _setting("mlp")
    there, _ = _setting("mlp", seed=5)
    found = layer_hessian(Objective(model, batches), there.state_dict(), "0")
    torch.testing.assert_close(found, layer_hessian(Objective(there, batches), None, "0"))
    assert not torch.allclose(found, layer_hessian(Objective(model, batches), None, "0"))


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_loss_has_no_curvature_in_a_layer_and_some_between_layers(method):
    model, batches = _setting("deep linear")
    objective = Objective(model, batches, loss_fn=lambda output, _: output.mean())
    assert not layer_hessian(objective, None, "0", method=method).any()
    blocks = _dense(model, batches, lambda output, _: output.mean())
    expected = _assembled(blocks, ["0.weight", "0.bias"], ["1.weight", "1.bias"])
    found = cross_layer_hessian(objective, None, "0", "1", method=method)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.any()


def test_a_layer_without_a_part_in_the_loss_has_a_block_of_zeros():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.fc = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            self.idle(x)
            return self.fc(x)

    _, batches = _setting("mlp")
    objective = Objective(Idle().double(), batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not layer_hessian(objective, None, "idle").any()
        assert not cross_layer_hessian(objective, None, "idle", "fc").any()


@pytest.mark.filterwarnings("error::lmc_curvature.errors.FallbackWarning")
def test_a_saturated_softmax_in_single_precision_raises_no_false_alarm():
    torch.manual_seed(0)
    # Logits of 16 leave curvatures of 1e-7, so that both roads are off by a percent or two in rounding.
    model = nn.Sequential(nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 5))
    with torch.no_grad():
        for layer, scale in ((model[0], 4.0), (model[2], 16 / 3.5)):
            layer.weight.copy_(scale * torch.eye(5))
            layer.bias.zero_()
    objective = Objective(model, [(torch.eye(5).repeat(2, 1) + 0.02 * torch.randn(10, 5), torch.arange(10) % 5)])
    for layer in ("0", "2"):
        found, expected = (
            layer_hessian(objective, None, layer, method=method) for method in ("structured", "products")
        )
        assert torch.linalg.norm(found - expected) <= 0.2 * torch.linalg.norm(expected)


def test_nothing_is_left_behind():
    model, batches = _setting("in place")
    objective = Objective(model, batches)
    with untouched(model):
        cross_layer_hessian(objective, None, "first", "third")
    broken = [*batches, (batches[0][0] * torch.nan, batches[0][1])]
    with pytest.raises(NonFiniteError, match="loss is nan at batch 2"):
        layer_hessian(Objective(model, broken), None, "first")
    assert not any(module._forward_hooks for module in objective.network.modules())


def test_a_block_that_is_not_finite_is_refused():
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    data = [(torch.ones(4, 3, dtype=torch.float64), torch.zeros(4))]
    objective = Objective(model, data, loss_fn=lambda output, _: output.abs().pow(1.5).mean())
    with pytest.raises(NonFiniteError, match="Hessian block of 'weight' and 'weight' is not finite.*square root"):
        layer_hessian(objective, None, "weight", partition="tensor", method="products")


class _Unvisited:
    """A loader that must not be visited."""

    def __iter__(self):
        raise AssertionError("visited")


def test_a_block_too_large_is_refused_before_any_work():
    objective = Objective(nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 3)), _Unvisited())
    with pytest.raises(
        MemoryBudgetError,
        match=r"dense 120400 × 120400 block of '0' takes 108 GiB, more than memory_gib=4: use.*Operator.*block\('0'\)",
    ):
        layer_hessian(objective, None, "0")
    with pytest.raises(
        MemoryBudgetError, match=r"dense 120400 × 1203 block of '0', '1' takes 1\.08 GiB.*memory_gib=0\.5"
    ):
        cross_layer_hessian(objective, None, "0", "1", memory_gib=0.5)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": "fx"}, PartitionError, "no layer 'fx': did you mean 'fc'"),
        ({"method": "structurd"}, OptionError, "method='structurd' is not a choice: did you mean 'structured'"),
        ({"layer": "embedding", "method": "structured"}, OptionError, "layer 'embedding' has no nn.Linear"),
        ({"state": {"fc.wait": torch.ones(1)}}, ValueError, "no entry 'fc.wait'"),
        ({"state": {"fc.bias": torch.full((3,), torch.nan)}}, NonFiniteError, "Entry 'fc.bias' of the state has 3"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, error, message):
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(5, 4))
    model.add_module("fc", nn.Linear(4, 3))
    with pytest.raises(error, match=message):
        layer_hessian(Objective(model, _Unvisited()), **{"state": None, "layer": "fc", **arguments})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["tokens", "images"])
def test_blocks_on_a_gpu_equal_those_on_a_cpu(name):
    model, batches = _setting(name)
    names = HessianOperator(Objective(model, batches)).partition.names
    for a, b in itertools.combinations_with_replacement(names, 2):
        expected = cross_layer_hessian(Objective(model, batches), None, a, b)
        found = cross_layer_hessian(Objective(model, batches, device="cuda"), None, a, b)
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_computed_in_inference_mode(method):
    model, batches = _setting("mlp")
    objective = Objective(model, batches)
    expected = layer_hessian(objective, None, "0", method=method)
    with torch.inference_mode():
        found = layer_hessian(objective, None, "0", method=method)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
