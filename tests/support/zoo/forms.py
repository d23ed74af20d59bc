"""Networks of other forms: shared weights, experts, control flow, adapters, rounding, checkpoints."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d, roi_align

from lmc_curvature import BatchLoss
from tests.support.cases import CASES
from tests.support.networks import NETWORKS
from tests.support.zoo.specimen import CLASSES, POLICIES, REGRESSION, Specimen, classified, labels, numbers, regressed

WIDTH = 4
_VECTOR, _IMAGE = classified(WIDTH), classified(2, 6, 6)


class _Two(nn.Module):
    """Two linear layers, with something between them for others to say."""

    def __init__(self, hidden: int = 6):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, CLASSES)

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def _of_case(name: str, family: str, **options: Any) -> Specimen:
    case = CASES.get(name) or NETWORKS[name]
    losses = {"loss of its own": case.options["loss_fn"]} if "loss_fn" in case.options else None
    return Specimen(
        family,
        case.make_model,
        lambda generator: case.make_batch(generator, 3),
        **({} if losses is None else {"losses": losses}),
        **options,
    )


# --- Shared weights


class _Universal(_Two):
    """One layer, applied again and again, with weights that are shared."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def between(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x)) + x
        return x


class _Twins(nn.Module):
    """Embeds two inputs by one network and compares them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Any) -> Tensor:
        return self.scale * F.cosine_similarity(*(self.embed(x) for x in inputs))


def _pairs(generator: torch.Generator) -> Any:
    return (numbers(generator, 3, WIDTH), numbers(generator, 3, WIDTH)), labels(generator, 3, classes=2).double()


class _Hypernetwork(nn.Module):
    """A network that makes the weights of another for each example."""

    def __init__(self):
        super().__init__()
        self.weights, self.fc = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x).unflatten(1, (6, WIDTH))
        return self.fc(torch.tanh(torch.einsum("bow,bw->bo", weights, x.flip(1))))


# --- Experts


class _Experts(nn.Module):
    """Linear experts under a router; subclasses say how they are called."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH)) for _ in "abc")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mixed(x, self.router(x).softmax(-1)))


class _AllExperts(_Experts):
    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("be,bew->bw", weights, torch.stack([expert(x) for expert in self.experts], 1))


class _MaskedExperts(_Experts):
    """Calls all experts, and drops what the two best did not say."""

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        chosen = torch.zeros_like(weights).scatter(1, weights.topk(2).indices, 1.0)
        found = torch.stack([expert(x) for expert in self.experts], 1)
        return torch.einsum("be,bew->bw", weights * chosen, found)


class _GatheredExperts(_Experts):
    """Gathers the weights of the best expert of every example."""

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        best, expert = weights.max(-1)
        first, second = (torch.stack([each[k].weight for each in self.experts])[expert] for k in (0, 2))
        return best[:, None] * torch.einsum("bvw,bw->bv", second, F.gelu(torch.einsum("bvw,bw->bv", first, x)))


class _ExpertsByPlaces(_Experts):
    """Calls each expert with the examples that chose it, by their places."""

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        best, chosen = weights.max(-1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (places,) = torch.where(chosen == number)
            found = found.index_add(0, places, expert(x[places]) * best[places, None])
        return found


class _ExpertsByMask(_Experts):
    """Calls each expert with the examples that chose it, by a mask."""

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        best, chosen = weights.max(-1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            found[chosen == number] = expert(x[chosen == number])
        return best[:, None] * found


# --- Control flow


class _EarlyExit(_Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.mean() > 0:
            return self.second(x.sin())
        return self.second(x.cos())


class _FixedPoint(_Two):
    """Iterates until nothing changes, and is differentiated through all of it."""

    def between(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        while (change := torch.tanh(x + 0.1 * y) - y).abs().max() > 1e-9:
            y = y + change
        return y


class _SoftHalting(_Two):
    """Weighs a fixed number of steps by when it would have halted."""

    def __init__(self):
        super().__init__()
        self.layer, self.halt = nn.Linear(6, 6), nn.Linear(6, 1)

    def between(self, x: Tensor) -> Tensor:
        remaining, total = 1.0, 0.0
        for _ in range(3):
            x = torch.tanh(self.layer(x))
            halted = torch.sigmoid(self.halt(x)) * remaining
            total, remaining = total + halted * x, remaining - halted
        return total + remaining * x


class _Switch(_Two):
    """Branches on settings: a plain one, and one that is kept as a tensor."""

    def __init__(self):
        super().__init__()
        self.steps = 2
        self.register_buffer("is_gated", torch.tensor(True))

    def between(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x * torch.sigmoid(x) if self.is_gated else torch.tanh(x)
        return x


class _Runge(_Two):
    """A differential equation whose right side is a network, by four steps of Runge and Kutta."""

    def __init__(self):
        super().__init__()
        self.field = nn.Linear(6, 6)

    def between(self, x: Tensor) -> Tensor:
        def slope(y: Tensor) -> Tensor:
            return torch.tanh(self.field(y))

        for _ in range(4):
            a = slope(x)
            b = slope(x + a / 8)
            c = slope(x + b / 8)
            x = x + (a + 2 * b + 2 * c + slope(x + c / 4)) / 24
        return x


class _Implicit(torch.autograd.Function):
    """The solution y of y = tanh(x + 0.1 y), differentiated where it is and not on the way to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(40):
            y = torch.tanh(x + 0.1 * y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        inner = 1 - y * y
        return slopes[0] * inner / (1 - 0.1 * inner)


class _Equilibrium(_Two):
    def between(self, x: Tensor) -> Tensor:
        return _Implicit.apply(x)


class _Ensemble(nn.Module):
    """Several networks at once, mapped over their stacked weights."""

    def __init__(self):
        super().__init__()
        members = [_Two() for _ in range(3)]
        stacked = stack_module_state(members)[0]
        self.names = [name.replace(".", "_") for name in stacked]
        for name, tensor in stacked.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.detach()))
        object.__setattr__(self, "base", members[0].to("meta"))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name.replace("_", "."): getattr(self, name) for name in self.names}
        return vmap(lambda each: functional_call(self.base, each, (x,)))(weights).mean(0)


# --- Derivatives inside


class _Energy(nn.Module):
    """The slope of a network in its input, as Hamiltonian networks have it."""

    def __init__(self, *, by_transform: bool):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 1))
        self.by_transform = by_transform

    def forward(self, x: Tensor) -> Tensor:
        if self.by_transform:
            return grad(lambda y: self.net(y).sum())(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def _residual(network: nn.Module, batch: Tensor) -> Tensor:
    """Of the equation u″ = −u, at random points."""

    def value(x: Tensor) -> Tensor:
        return network(x.reshape(1, 1)).squeeze()

    return (vmap(grad(grad(value)))(batch[:, 0]) + vmap(value)(batch[:, 0])).square().mean()


# --- Adapters, rounding, randomness


class _LowRank(nn.Module):
    """A frozen linear layer with an adapter of low rank."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * x @ self.down.T @ self.up.T


class _StraightThrough(_Two):
    """Rounds activations, with the slope of what was rounded."""

    def between(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return x + ((4 * x).round() / 4 - x).detach()


def _fake_quantized() -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    rounding = FakeQuantize(MovingAverageMinMaxObserver, 0, 255)
    rounding.disable_observer()
    return nn.Sequential(nn.Linear(WIDTH, 6), rounding, nn.Tanh(), nn.Linear(6, CLASSES))


class _Codebook(_Two):
    """Takes the nearest vector of a codebook."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 6))

    def between(self, x: Tensor) -> Tensor:
        return self.codes[torch.cdist(x, self.codes).argmin(1)] + 0.1 * x


class _Gumbel(_Two):
    def between(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(x)


class _Variational(nn.Module):
    """A variational autoencoder, whose noise comes with the batch, or is drawn."""

    def __init__(self, *, draws: bool = False):
        super().__init__()
        self.encode, self.decode, self.draws = nn.Linear(WIDTH, 4), nn.Linear(2, WIDTH), draws

    def forward(self, inputs: Any) -> Any:
        x, noise = inputs
        mean, log_variance = self.encode(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.draws else noise
        return self.decode(mean + noise * (log_variance / 2).exp()), mean, log_variance


def _bound(output: Any, target: Tensor) -> Tensor:
    found, mean, log_variance = output
    divergence = (log_variance.exp() + mean.square() - 1 - log_variance).sum(1) / 2
    return ((found - target).square().sum(1) + divergence).mean()


def _noisy(generator: torch.Generator) -> Any:
    x = numbers(generator, 3, WIDTH)
    return (x, numbers(generator, 3, 2)), x


class _Checkpointed(_Two):
    def __init__(self, *, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=self.reentrant))


# --- Geometry and algebra


class _Radial(nn.Module):
    """Radial functions around centres that move."""

    def __init__(self):
        super().__init__()
        self.centres, self.fc = nn.Parameter(torch.randn(5, WIDTH)), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.exp(-torch.cdist(x, self.centres).square() / 8))


class _Splines(nn.Module):
    """Piecewise linear functions of each input, as Kolmogorov–Arnold networks sum them."""

    def __init__(self):
        super().__init__()
        self.heights, self.fc = nn.Parameter(torch.randn(6, WIDTH, 5)), nn.Linear(6, CLASSES)
        self.register_buffer("knots", torch.linspace(-2, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        hats = F.relu(1 - (x.unsqueeze(-1) - self.knots).abs())
        return self.fc(torch.tanh(torch.einsum("bwk,owk->bo", hats, self.heights)))


class _Flow(nn.Module):
    """Coupling layers and a linear one; gives the log density of its inputs."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 4) for _ in range(2))
        self.matrix = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        volume = torch.linalg.slogdet(self.matrix).logabsdet.expand(len(x))
        x = x @ self.matrix
        for net in self.nets:
            kept, moved = x.chunk(2, 1)
            scale, shift = torch.tanh(net(kept)).chunk(2, 1)
            x, volume = torch.cat([moved * scale.exp() + shift, kept], 1), volume + scale.sum(1)
        return volume - x.square().sum(1) / 2


class _GaussianProcess(nn.Module):
    """Features of a network under a Gaussian process: the likelihood of all targets together."""

    def __init__(self):
        super().__init__()
        self.net, self.log_noise = nn.Linear(WIDTH, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.net(x))
        kernel = torch.exp(-(x.unsqueeze(1) - x).square().sum(-1))
        return kernel + self.log_noise.exp() * torch.eye(len(x), dtype=x.dtype)


def _evidence(kernel: Tensor, target: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(kernel)
    whitened = torch.linalg.solve_triangular(lower, target, upper=False)
    return (whitened.square().sum() / 2 + lower.diagonal().log().sum()) / len(target)


class _Spectrum(nn.Module):
    """Pools images by the eigenvalues of their channels' covariance."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        return self.fc(torch.linalg.eigvalsh(x @ x.mT / x.shape[-1]).clamp_min(1e-3).log())


class _Spatial(nn.Module):
    """Turns and moves an image by what a network says of it."""

    def __init__(self):
        super().__init__()
        self.locate, self.conv, self.fc = nn.Linear(2, 6), nn.Conv2d(2, 3, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.eye(2, 3) + 0.1 * torch.tanh(self.locate(x.mean((2, 3)))).unflatten(1, (2, 3))
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.fc(torch.tanh(self.conv(F.grid_sample(x, grid, align_corners=False))).mean((2, 3)))


class _Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset, self.fc = nn.Conv2d(2, 18, 3), nn.Linear(3, CLASSES)
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(deform_conv2d(x, self.offset(x), self.weight)).mean((2, 3)))


class _Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.tensor([[float(i), 0.3, 0.2, 3.1, 3.4] for i in range(len(x))], dtype=x.dtype)
        return self.fc(roi_align(self.conv(x), boxes, 2).flatten(1))


class _UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.norm, self.out = nn.GroupNorm(2, 4), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.down(x)))
        return self.out(torch.cat([x, F.silu(self.up(self.middle(F.max_pool2d(x, 2))))], 1))


class _Capsules(nn.Module):
    """Capsules that agree by a few rounds of routing."""

    def __init__(self):
        super().__init__()
        self.poses = nn.Parameter(torch.randn(2, CLASSES, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("icod,bid->bico", self.poses, x.unflatten(1, (2, 2)))
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(3):
            pose = (logits.softmax(2).unsqueeze(-1) * votes).sum(1)
            length = pose.norm(dim=-1, keepdim=True)
            pose = pose * length / (1 + length**2)
            logits = logits + (votes * pose.unsqueeze(1)).sum(-1)
        return pose.norm(dim=-1)


class _Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(7, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.bag(x)))


class _Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.sin(3 * self.second(torch.sin(3 * self.first(x)))))


class _Pair(nn.Module):
    """Calls a module of two arguments with hidden units and their inputs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.first, self.module = nn.Linear(WIDTH, WIDTH), module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(torch.tanh(self.first(x)), x)


def _words(generator: torch.Generator) -> Any:
    return labels(generator, 3, 4, classes=7), labels(generator, 3)


def _pixels(generator: torch.Generator) -> Any:
    return numbers(generator, 3, 2, 6, 6), labels(generator, 3, 6, 6)


def _sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


FORMS = {
    "tied autoencoder": _of_case("tied weights", "shared weights"),
    "universal layer": Specimen("shared weights", _Universal, _VECTOR),
    "Siamese": Specimen("shared weights", _Twins, _pairs, {"squared error": F.mse_loss}),
    "hypernetwork": Specimen("shared weights", _Hypernetwork, _VECTOR),
    "all experts": Specimen("experts", _AllExperts, _VECTOR),
    "two best experts, by a mask on all": Specimen("experts", _MaskedExperts, _VECTOR),
    "best expert, weights gathered": Specimen("experts", _GatheredExperts, _VECTOR),
    "a loop over experts, by places": Specimen("experts", _ExpertsByPlaces, _VECTOR),
    "a loop over experts, by a mask": Specimen("experts", _ExpertsByMask, _VECTOR),
    "branch on a value": Specimen("control flow", _EarlyExit, _VECTOR),
    "branch on settings": Specimen("control flow", _Switch, _VECTOR),
    "fixed point, as many steps as it takes": Specimen("control flow", _FixedPoint, _VECTOR),
    "fixed point, differentiated implicitly": Specimen("control flow", _Equilibrium, _VECTOR),
    "soft halting": Specimen("control flow", _SoftHalting, _VECTOR),
    "neural differential equation": Specimen("control flow", _Runge, _VECTOR),
    "ensemble by vmap": Specimen("control flow", _Ensemble, _VECTOR),
    "slope of a network, torch.func.grad": Specimen(
        "derivatives inside", lambda: _Energy(by_transform=True), regressed((WIDTH,), (WIDTH,)), REGRESSION
    ),
    "slope of a network, torch.autograd.grad": Specimen(
        "derivatives inside", lambda: _Energy(by_transform=False), regressed((WIDTH,), (WIDTH,)), REGRESSION
    ),
    "physics-informed": Specimen(
        "derivatives inside",
        lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)),
        lambda generator: numbers(generator, 4, 1),
        {"residual of u″ = −u": BatchLoss(_residual)},
    ),
    "LoRA": Specimen("adapters", lambda: _sequential(_LowRank(WIDTH, 6), nn.GELU(), _LowRank(6, CLASSES)), _VECTOR),
    "straight-through rounding": Specimen("rounding", _StraightThrough, _VECTOR),
    "FakeQuantize": Specimen("rounding", _fake_quantized, _VECTOR),
    "codebook": Specimen("rounding", _Codebook, _VECTOR),
    "Gumbel softmax": Specimen("randomness", _Gumbel, _VECTOR),
    "VAE, noise in the batch": Specimen("randomness", _Variational, _noisy, {"evidence bound": _bound}),
    "VAE, noise drawn": Specimen("randomness", lambda: _Variational(draws=True), _noisy, {"evidence bound": _bound}),
    "dropout": _of_case("dropout", "randomness"),
    "checkpoint": Specimen("checkpoints", lambda: _Checkpointed(reentrant=False), _VECTOR),
    "checkpoint, reentrant": Specimen("checkpoints", lambda: _Checkpointed(reentrant=True), _VECTOR),
    "convolutions, batch norm": _of_case("conv, interpolate", "normalisation", policies=POLICIES),
    "instance norm": _of_case("instance", "normalisation", policies=POLICIES),
    "weight norm": _of_case("weight norm", "normalisation"),
    "spectral norm": Specimen(
        "normalisation",
        lambda: _sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, 6)), nn.Tanh(), nn.Linear(6, CLASSES)),
        _VECTOR,
    ),
    "orthogonal": Specimen(
        "normalisation",
        lambda: _sequential(parametrizations.orthogonal(nn.Linear(WIDTH, 4)), nn.Tanh(), nn.Linear(4, CLASSES)),
        _VECTOR,
    ),
    "temperature": _of_case("scalar parameter", "other forms"),
    "a network with its own loss": _of_case("dict batches", "other forms"),
    "SIREN": Specimen("other forms", _Sine, regressed((2,), (1,)), REGRESSION),
    "radial functions": Specimen("other forms", _Radial, _VECTOR),
    "splines": Specimen("other forms", _Splines, _VECTOR),
    "bilinear": Specimen("other forms", lambda: _Pair(nn.Bilinear(WIDTH, WIDTH, CLASSES)), _VECTOR),
    "normalising flow": Specimen(
        "densities", _Flow, _VECTOR, {"negative log density": lambda output, _: -output.mean()}
    ),
    "deep kernel": Specimen("densities", _GaussianProcess, regressed((WIDTH,), (1,)), {"evidence": _evidence}),
    "eigenvalues": Specimen("algebra", _Spectrum, _IMAGE),
    "spatial transformer": Specimen("images", _Spatial, _IMAGE),
    "deformable convolution": Specimen("images", _Deformable, _IMAGE),
    "regions": Specimen("images", _Regions, _IMAGE),
    "U-Net": Specimen("images", _UNet, _pixels),
    "capsules": Specimen("other forms", _Capsules, _VECTOR),
    "embedding bag": Specimen("other forms", _Bag, _words),
}
