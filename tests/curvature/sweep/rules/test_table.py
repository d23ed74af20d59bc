"""Claim: the sweep is exact for each operation a network may be made of, by whichever rule it goes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lmc_curvature.curvature.sweep.rules import table as op_rules
from tests.support.sweeping import around, assert_sweep_agrees, layer_directions

VECTOR, SEQUENCE, LINE, IMAGE, VOLUME = (6,), (4, 6), (2, 9), (2, 5, 6), (2, 3, 4, 4)
SQUARE = (3, 3)

MODULES = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), LINE),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), IMAGE),
    "conv2d strided, without bias": (lambda: nn.Conv2d(2, 4, 3, stride=2, bias=False), IMAGE),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2), IMAGE),
    "conv2d grouped": (lambda: nn.Conv2d(2, 4, 3, groups=2), IMAGE),
    "conv2d depthwise": (lambda: nn.Conv2d(2, 2, 3, groups=2, padding=1), IMAGE),
    "conv2d padded to the same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), IMAGE),
    "conv2d padded by reflection": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv2d padded by replication": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), IMAGE),
    "conv2d padded by the other side": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), VOLUME),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), LINE),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), IMAGE),
    "transposed conv2d grouped": (lambda: nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2), IMAGE),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2), VOLUME),
    "linear": (lambda: nn.Linear(6, 4), SEQUENCE),
    "bilinear": (lambda: _Twice(nn.Bilinear(6, 6, 3)), VECTOR),
    "weight norm": (lambda: weight_norm(nn.Linear(6, 4)), SEQUENCE),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), VECTOR),
    "batch norm of images": (lambda: nn.BatchNorm2d(2), IMAGE),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(2), VOLUME),
    "batch norm without affine map": (lambda: nn.BatchNorm2d(2, affine=False), IMAGE),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(2, track_running_stats=False), IMAGE),
    "batch norm with fixed statistics": (lambda: _FixedNorm(), IMAGE),
    "conv, batch norm, relu": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True)), IMAGE),
    "transposed conv, batch norm": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.BatchNorm2d(3)), IMAGE),
    "layer norm": (lambda: nn.LayerNorm(6), SEQUENCE),
    "layer norm without affine map": (lambda: nn.LayerNorm(6, elementwise_affine=False), SEQUENCE),
    "layer norm of two axes": (lambda: nn.LayerNorm((5, 6), bias=False), IMAGE),
    "RMS norm": (lambda: nn.RMSNorm(6), SEQUENCE),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm of one group": (lambda: nn.GroupNorm(1, 2, affine=False), IMAGE),
    "instance norm": (lambda: nn.InstanceNorm2d(2, affine=True), IMAGE),
    "instance norm of lines": (lambda: nn.InstanceNorm1d(2), LINE),
    "instance norm of volumes": (lambda: nn.InstanceNorm3d(2, affine=True), VOLUME),
    "instance norm with statistics": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGE),
    "local response norm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "PReLU": (lambda: nn.PReLU(), VECTOR),
    "PReLU for each channel": (lambda: nn.PReLU(2), IMAGE),
    "attention": (lambda: _SelfAttention(need_weights=True), SEQUENCE),
    "attention without weights": (lambda: _SelfAttention(need_weights=False), SEQUENCE),
    "attention to the past": (lambda: _SelfAttention(attn_mask=torch.ones(4, 4).triu(1).bool()), SEQUENCE),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), SEQUENCE),
    "encoder layer, norm first": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
        SEQUENCE,
    ),
    "decoder layer": (lambda: _Twice(nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)), SEQUENCE),
}

ACTIVATIONS = {
    str(module): module
    for module in (
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.1),
        nn.RReLU(),
        nn.ReLU6(),
        nn.ELU(),
        nn.ELU(0.7, inplace=True),
        nn.SELU(),
        nn.CELU(0.7),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Hardtanh(),
        nn.Softplus(),
        nn.Softplus(3.0, threshold=0.5),
        nn.Mish(),
        nn.Threshold(0.1, 0.2),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.SiLU(inplace=True),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.LogSigmoid(),
        nn.Softsign(),
        nn.Softshrink(0.2),
        nn.Hardshrink(0.2),
        nn.Tanhshrink(),
        nn.GLU(),
        nn.Softmax(-1),
        nn.Softmin(-1),
        nn.LogSoftmax(-1),
        nn.Dropout(0.5),
    )
}

POOLINGS = {
    f"{name} {axes}d": (getattr(nn, f"{name}{axes}d")(*arguments), shape)
    for axes, shape in ((1, LINE), (2, IMAGE), (3, VOLUME))
    for name, arguments in {
        "MaxPool": (2,),
        "AvgPool": (2,),
        "AdaptiveMaxPool": (2,),
        "AdaptiveAvgPool": (2,),
        "LPPool": (2, 2),
    }.items()
} | {
    "max pool, overlapping": (nn.MaxPool2d(3, stride=1, padding=1), IMAGE),
    "max pool, dilated": (nn.MaxPool2d(2, dilation=2, ceil_mode=True, padding=1), IMAGE),
    "average pool, overlapping": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    "average pool of lines, overlapping": (nn.AvgPool1d(3, 2, 1), LINE),
    "adaptive max pool to one": (nn.AdaptiveMaxPool2d(1), IMAGE),
    "adaptive average pool to one": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive average pool, channels last": (
        lambda x: F.adaptive_avg_pool2d(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 1),
        IMAGE,
    ),
    "fractional max pool": (
        nn.FractionalMaxPool2d(2, output_size=3, _random_samples=torch.full((3, 2, 2), 0.4, dtype=torch.float64)),
        IMAGE,
    ),
    "fractional max pool of volumes": (
        nn.FractionalMaxPool3d(2, output_size=2, _random_samples=torch.full((3, 1, 3), 0.4, dtype=torch.float64)),
        (1, 4, 4, 4),
    ),
    "cubic pool of positive numbers": (lambda x: F.lp_pool2d(x.exp(), 3.0, 2), IMAGE),
    "unpooled": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(5, 6)), IMAGE),
}

RESIZINGS = {
    f"{mode} {len(shape) - 1}d": (lambda x, mode=mode: F.interpolate(x, scale_factor=1.6, mode=mode), shape)
    for shape, modes in {
        LINE: ("nearest", "nearest-exact", "linear", "area"),
        IMAGE: ("nearest", "nearest-exact", "bilinear", "bicubic", "area"),
        VOLUME: ("nearest", "nearest-exact", "trilinear", "area"),
    }.items()
    for mode in modes
} | {
    "bilinear, corners aligned": (
        lambda x: F.interpolate(x, size=(7, 4), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "bilinear, antialiased": (lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True), IMAGE),
    "bicubic, antialiased": (lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True), IMAGE),
}


def _positive(function):
    return lambda x: function(F.softplus(x) + 0.1)


def _inside(function):
    return lambda x: function(0.9 * torch.tanh(x))


FUNCTIONS = {
    **{
        function.__name__: (function, VECTOR)
        for function in (
            *(torch.neg, torch.exp, torch.exp2, torch.expm1, torch.sin, torch.cos, torch.tan, torch.atan, torch.sinh),
            *(torch.cosh, torch.asinh, torch.erf, torch.erfc, torch.tanh, torch.sigmoid, torch.square, torch.sinc),
            *(torch.reciprocal, torch.abs, torch.frac),
        )
    },
    **{
        function.__name__: (_positive(function), VECTOR)
        for function in (torch.log, torch.log1p, torch.log2, torch.sqrt, torch.rsqrt, torch.lgamma, torch.digamma)
    },
    **{
        function.__name__: (_inside(function), VECTOR)
        for function in (torch.asin, torch.acos, torch.atanh, torch.erfinv)
    },
    "acosh": (lambda x: torch.acosh(x * x + 1.2), VECTOR),
    "logit": (lambda x: torch.logit(torch.sigmoid(x), eps=1e-3), VECTOR),
    "square of itself": (lambda x: x * x, VECTOR),
    "power": (lambda x: x**3, VECTOR),
    "fractional power": (_positive(lambda x: x**1.7), VECTOR),
    "power of a number": (lambda x: 1.7**x, VECTOR),
    "powers, broadcast": (lambda x: x.unsqueeze(-1) ** torch.arange(1, 4), VECTOR),
    "quotient by a number": (lambda x: x / 3, VECTOR),
    "quotient of a number": (lambda x: 2 / (x * x + 1), VECTOR),
    "quotient by whole numbers": (lambda x: x / torch.arange(1, 7), VECTOR),
    "quotient by the sum": (lambda x: x / (x * x).sum(), VECTOR),
    "rounded quotient": (lambda x: x * x + torch.div(x, 0.3, rounding_mode="floor"), VECTOR),
    "remainder": (lambda x: torch.remainder(x, 0.7), VECTOR),
    "rounded": (lambda x: x * torch.round(3 * x), VECTOR),
    "sign": (lambda x: x * x * torch.sign(x), VECTOR),
    "half plane": (lambda x: x * (x > 0), VECTOR),
    "clamped": (lambda x: x.clamp(-0.3, 0.4), VECTOR),
    "clamped below": (lambda x: x.clamp_min(0.1), VECTOR),
    "clamped, broadcast": (lambda x: x.unsqueeze(-1).clamp(torch.tensor([-0.3, 0.1]), torch.tensor(0.4)), VECTOR),
    "softmax along the middle": (lambda x: torch.softmax(x, 1), SEQUENCE),
    "softmax in part": (lambda x: torch.softmax(x.masked_fill(torch.arange(6) % 3 == 0, -torch.inf), -1), VECTOR),
    "log softmax along the batch": (lambda x: F.log_softmax(x, 0), VECTOR),
    "normalized": (lambda x: F.normalize(x, dim=-1), SEQUENCE),
    **{
        f"norm of order {order}": (lambda x, order=order: x.norm(order, dim=-1), SEQUENCE)
        for order in (1, 2, 3, torch.inf)
    },
    "matrix norm": (lambda x: torch.linalg.matrix_norm(x).unsqueeze(1), SEQUENCE),
    "variance": (lambda x: x.var(-1), SEQUENCE),
    "variance without correction": (lambda x: x.var((1, 2), correction=0, keepdim=True), SEQUENCE),
    "variance of everything": (lambda x: x * x.var(), SEQUENCE),
    "variance and mean": (lambda x: torch.cat(torch.var_mean(x, dim=1), -1), SEQUENCE),
    "standard deviation": (lambda x: x.std(-1), SEQUENCE),
    "standard deviation and mean": (lambda x: torch.cat(torch.std_mean(x, dim=1), -1), SEQUENCE),
    "mean": (lambda x: x.mean(1), SEQUENCE),
    "sum": (lambda x: x * x.sum((1, 2), keepdim=True), SEQUENCE),
    "product": (lambda x: x.prod(-1), SEQUENCE),
    "cumulative sum": (lambda x: x.cumsum(-1), SEQUENCE),
    "cumulative product": (lambda x: x.cumprod(-1), SEQUENCE),
    "cumulative maximum": (lambda x: x.cummax(-1)[0], SEQUENCE),
    "logsumexp": (lambda x: x.logsumexp(-1), SEQUENCE),
    "logcumsumexp": (lambda x: x.logcumsumexp(-1), SEQUENCE),
    "largest": (lambda x: x.max(-1)[0], SEQUENCE),
    "smallest, axis kept": (lambda x: x * x.min(1, keepdim=True)[0], SEQUENCE),
    "largest of several axes": (lambda x: x.amax((1, 2)).unsqueeze(1), SEQUENCE),
    "smallest and largest": (lambda x: torch.cat(x.aminmax(dim=-1), -1), SEQUENCE),
    "largest of all": (lambda x: x * x.max(), SEQUENCE),
    "largest two": (lambda x: x.topk(2)[0], SEQUENCE),
    "sorted": (lambda x: x.sort(-1, descending=True)[0], SEQUENCE),
    "sorted by places": (lambda x: x.gather(-1, x.argsort(-1)), SEQUENCE),
    "median": (lambda x: x.median(-1)[0], SEQUENCE),
    "second smallest": (lambda x: x.kthvalue(2, 1)[0], SEQUENCE),
    "differences": (lambda x: x.diff(), SEQUENCE),
    "sliced": (lambda x: x[:, 1:, ::2], SEQUENCE),
    "selected": (lambda x: x[:, -1], SEQUENCE),
    "indexed by a list": (lambda x: x[:, [0, 2, 2]], SEQUENCE),
    "indexed by places": (lambda x: x[:, torch.tensor([0, 1]), torch.tensor([3, 4])], SEQUENCE),
    "indexed by a mask": (lambda x: x[:, torch.tensor([True, False, True, True])], SEQUENCE),
    "index_select": (lambda x: x.index_select(1, torch.tensor([0, 0, 3])), SEQUENCE),
    "gather": (lambda x: x.gather(1, torch.tensor([[0, 1, 1], [5, 5, 2], [3, 0, 4]])), VECTOR),
    "take": (lambda x: torch.take(x, torch.arange(9).view(3, 3)), VECTOR),
    "permuted": (lambda x: x.permute(0, 2, 1).reshape(x.shape[0], -1), SEQUENCE),
    "transposed": (lambda x: x.mT.contiguous().view(x.shape[0], -1), SEQUENCE),
    "chunks": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], SEQUENCE),
    "split": (lambda x: x.split([1, 3], 1)[1], SEQUENCE),
    "unbound": (lambda x: x.unbind(1)[2] * x.unbind(1)[0], SEQUENCE),
    "flipped and rolled": (lambda x: x.flip(1).roll(1, 2), SEQUENCE),
    "repeated": (lambda x: x.repeat(1, 2, 1), SEQUENCE),
    "repeated one by one": (lambda x: x.repeat_interleave(2, 1), SEQUENCE),
    "expanded": (lambda x: x.unsqueeze(1).expand(-1, 3, -1), VECTOR),
    "filled": (lambda x: x.index_fill(1, torch.tensor([1]), 0.3), VECTOR),
    "diagonal": (lambda x: x.diagonal(dim1=1, dim2=2), SQUARE),
    "diagonal matrix": (torch.diag_embed, VECTOR),
    "triangles": (lambda x: x.tril() + x.triu(1) ** 2, SQUARE),
    "trace": (lambda x: torch.stack([matrix.trace() for matrix in x]).unsqueeze(1), SQUARE),
    "windows": (lambda x: x.unfold(1, 3, 2), VECTOR),
    "unfold": (nn.Unfold(2), IMAGE),
    "fold": (nn.Fold((3, 3), 2), (8, 4)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 2, 3)),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (1, 4, 6)),
    "channel shuffle": (nn.ChannelShuffle(2), (4, 2, 3)),
    **{
        f"{mode} padding": (lambda x, mode=mode: F.pad(x, (1, 1, 2, 0), mode=mode), IMAGE)
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    "constant padding of lines, cropping": (lambda x: F.pad(x, (-1, 1), value=0.3), LINE),
    "reflection padding of volumes": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"), VOLUME),
    "replication padding of lines": (lambda x: F.pad(x, (1, 1), mode="replicate"), LINE),
    "with what is new": (lambda x: torch.cat([x.new_zeros(3, 1), torch.ones_like(x), x], 1), VECTOR),
    "cast and back": (lambda x: x.to(torch.float64) * torch.ones(6), VECTOR),
    "trace of a square": (lambda x: torch.einsum("bij,bji->b", x, x).unsqueeze(1), SQUARE),
    "matrix times vector": (lambda x: (x @ x[0]).unsqueeze(1) + torch.dot(x[0], x[1]), VECTOR),
    "matrix exponential": (torch.matrix_exp, SQUARE),
    "determinant": (lambda x: torch.linalg.det(x + 3 * torch.eye(3)).unsqueeze(1), SQUARE),
    "inverse": (lambda x: torch.linalg.inv(x + 3 * torch.eye(3)), SQUARE),
    "checkpointed": (lambda x: checkpoint(torch.sin, x, use_reentrant=False), VECTOR),
    "detached factor": (lambda x: x * x.detach(), VECTOR),
    "changed in place": (lambda x: (2 * x).add_(1).relu_() * x, VECTOR),
}


def _assigned(a, b):
    result = a.clone()
    result[:, 1] = b[:, 0] * a[:, 2]
    result[:, 2:4] *= b[:, :2]
    result += 1
    result[:, 5] = 0.3
    return result


_PLACES = torch.tensor([0, 1, 1, 3, 5, 0])
PAIRS = {
    "product": (lambda a, b: a * b, VECTOR, VECTOR),
    "product, broadcast": (lambda a, b: a * b, (3, 4), (1, 4)),
    "product with the mean": (lambda a, b: a * b.mean(), VECTOR, VECTOR),
    "residual": (lambda a, b: a + torch.tanh(b), VECTOR, VECTOR),
    "weighted sum": (lambda a, b: 2 - a + 3 * b.sub(a, alpha=2).add(a * b, alpha=3), VECTOR, VECTOR),
    "reversed difference": (lambda a, b: torch.rsub(a, b, alpha=2) * b, VECTOR, VECTOR),
    "quotient": (lambda a, b: a / (b * b + 1), VECTOR, VECTOR),
    "power": (lambda a, b: (F.softplus(a) + 0.2) ** b, VECTOR, VECTOR),
    "matmul": (lambda a, b: a @ b, (3, 4), (4, 2)),
    "bmm": (torch.bmm, (3, 4), (4, 2)),
    "outer product": (lambda a, b: a.unsqueeze(2) * b.unsqueeze(1), VECTOR, VECTOR),
    "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), (3, 4), (2, 4)),
    "tensordot": (lambda a, b: torch.tensordot(a, b[0], dims=([2], [1])), SEQUENCE, SEQUENCE),
    "cross product": (lambda a, b: torch.linalg.cross(a, b), (2, 3), (2, 3)),
    "convolution by computed weights": (lambda x, w: F.conv2d(x, w.mean(0).unsqueeze(1)), (1, 5, 6), (3, 2, 2)),
    "solution of equations": (lambda a, b: torch.linalg.solve(a + 3 * torch.eye(3), b), SQUARE, (3, 2)),
    "maximum": (torch.maximum, VECTOR, VECTOR),
    "minimum": (torch.minimum, VECTOR, VECTOR),
    "where": (lambda a, b: torch.where(a > b, a, b * b), VECTOR, VECTOR),
    "where, a number elsewhere": (lambda a, b: torch.where(a > 0, a, 0.5) * b, VECTOR, VECTOR),
    "masked_fill": (lambda a, b: a.masked_fill(b > 0, 0.3) * b, VECTOR, VECTOR),
    "masked_fill by a tensor": (lambda a, b: a.masked_fill(b > 0, b.mean()) * b, VECTOR, VECTOR),
    "masked_scatter": (lambda a, b: a.masked_scatter(torch.arange(6) % 2 == 0, b * b), VECTOR, VECTOR),
    "clamped by tensors": (lambda a, b: torch.clamp(a, min=b, max=b + 0.3), VECTOR, VECTOR),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3) * b, VECTOR, VECTOR),
    "lerp by a tensor": (lambda a, b: torch.lerp(a, b, a * b), VECTOR, VECTOR),
    "arc tangent": (lambda a, b: torch.atan2(a, b * b + 1), VECTOR, VECTOR),
    "hypot": (torch.hypot, VECTOR, VECTOR),
    "logaddexp": (torch.logaddexp, VECTOR, VECTOR),
    "cosine similarity": (lambda a, b: F.cosine_similarity(a, b, dim=-1), SEQUENCE, SEQUENCE),
    "pairwise distance": (F.pairwise_distance, SEQUENCE, SEQUENCE),
    "distances": (torch.cdist, SEQUENCE, SEQUENCE),
    "concatenation": (lambda a, b: torch.cat([a, b * a, torch.ones_like(a)], 1), VECTOR, VECTOR),
    "stack": (lambda a, b: torch.stack([a, b, a * b], 1), VECTOR, VECTOR),
    "assignment": (_assigned, VECTOR, VECTOR),
    "scatter": (lambda a, b: (a * a).scatter(1, torch.tensor([[0, 1, 2]] * 3), b[:, :3]), VECTOR, VECTOR),
    "scatter_add": (lambda a, b: (a * a).scatter_add(1, _PLACES.expand(3, -1), b), VECTOR, VECTOR),
    "scatter_reduce": (lambda a, b: a.scatter_reduce(1, _PLACES.expand(3, -1), b * b, "amax"), VECTOR, VECTOR),
    "index_add": (lambda a, b: (a * a).index_add(1, _PLACES, b, alpha=0.5), VECTOR, VECTOR),
    "index_copy": (lambda a, b: (a * a).index_copy(1, torch.tensor([0, 4]), b[:, :2]), VECTOR, VECTOR),
    "index_put": (
        lambda a, b: torch.index_put(a * a, (torch.tensor([0, 0]), torch.tensor([1, 1])), b[0, :2], accumulate=True),
        VECTOR,
        VECTOR,
    ),
    "select_scatter": (lambda a, b: torch.select_scatter(a * b, b[:, 0], 1, 2), VECTOR, VECTOR),
    "slice_scatter": (lambda a, b: torch.slice_scatter(a * b, b[:, :2], 1, 1, 3), VECTOR, VECTOR),
    "diagonal_scatter": (lambda a, b: torch.diagonal_scatter(a * b, b.sum(2), dim1=1, dim2=2), SQUARE, SQUARE),
    "sampled from a grid": (
        lambda x, g: F.grid_sample(x, 0.9 * torch.tanh(g).view(-1, 2, 3, 2), align_corners=False),
        IMAGE,
        (12,),
    ),
    "baddbmm": (
        lambda a, b: torch.baddbmm(a[:, :, :2], a, b, beta=0.5, alpha=2.0),
        (3, 4),
        (4, 2),
    ),
    "addmm": (lambda a, b: torch.addmm(a[0, :2], a, b.T @ b[:, :2], beta=0.3, alpha=1.5), VECTOR, VECTOR),
    "addcmul": (lambda a, b: torch.addcmul(a, b, a + b, value=0.7), VECTOR, VECTOR),
    "addcdiv": (lambda a, b: torch.addcdiv(a, b, F.softplus(a + b) + 0.3, value=0.7), VECTOR, VECTOR),
}

_HEADS = (2, 4, 3)
ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": torch.ones(4, 4).tril(1).bool()},
    "biased and scaled": {"attn_mask": torch.arange(16.0).view(4, 4).double() / 16, "scale": 0.3},
    "fewer keys": {"enable_gqa": True},
}


class _Twice(nn.Module):
    """Calls a module of two arguments with two views of one."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x.flip(-1))


class _SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.options = options

    def forward(self, x):
        return self.attention(x, x, x, **self.options)[0]


class _FixedNorm(nn.Module):
    """Normalises by statistics that no module tracks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("variance", torch.ones(2))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance.abs() + 0.5, self.weight, None, training=False)


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_modules(make, shape):
    assert_sweep_agrees(around(make(), shape))


@pytest.mark.parametrize("module", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(module):
    assert_sweep_agrees(around(module, VECTOR))


@pytest.mark.parametrize(("function", "shape"), POOLINGS.values(), ids=POOLINGS)
def test_poolings(function, shape):
    assert_sweep_agrees(around(function, shape))


@pytest.mark.parametrize(("function", "shape"), RESIZINGS.values(), ids=RESIZINGS)
def test_interpolation(function, shape):
    assert_sweep_agrees(around(function, shape))


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_of_one_tensor(function, shape):
    assert_sweep_agrees(around(function, shape))


@pytest.mark.parametrize(("function", "first", "second"), PAIRS.values(), ids=PAIRS)
def test_functions_of_two_tensors(function, first, second):
    assert_sweep_agrees(around(function, first, second))


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_scaled_dot_product_attention(options):
    queries = (4, 4, 3) if "enable_gqa" in options else _HEADS
    assert_sweep_agrees(
        around(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), queries, _HEADS, _HEADS)
    )


def test_products_of_three_tensors():
    assert_sweep_agrees(around(lambda a, b, c: torch.einsum("bi,bj,bk->bijk", a, b, c), (2,), (3,), (2,)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        # torch gives these a wrong second derivative, or none.
        (lambda: weight_norm(nn.Linear(6, 4)), VECTOR),
        (lambda: weight_norm(nn.Conv2d(2, 3, 2), dim=1), IMAGE),
        (nn.Hardsigmoid, VECTOR),
        (lambda: nn.Hardsigmoid(inplace=True), VECTOR),
    ],
    ids=["weight norm", "weight norm of another axis", "hard sigmoid", "hard sigmoid in place"],
)
def test_second_derivatives_that_torch_lacks_equal_differences_of_the_gradient(make, shape):
    objective = around(make(), shape)
    directions = layer_directions(objective)
    found = assert_sweep_agrees(objective, directions)
    state, h = objective.state(), 1e-4

    def gradient(step, direction):
        return objective.gradient({name: state[name] + step * tensor for name, tensor in direction.items()})

    for i, direction in enumerate(directions.values()):
        up, down = gradient(h, direction), gradient(-h, direction)
        for j, other in enumerate(directions.values()):
            difference = sum(((up[name] - down[name]) * tensor).sum().item() for name, tensor in other.items()) / (
                2 * h
            )
            assert found.curvature[i, j] == pytest.approx(difference, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding):
    def lookup(table):
        # Row 2 is looked up, and moves: torch takes it for a constant where it pads.
        return F.embedding(torch.tensor([[0, 2], [2, 5], [1, 1]]), table[0], padding_idx=padding)

    assert_sweep_agrees(around(lookup, (6, 4)))


# Not norms and deviations: at zero they have no second derivative in torch either, and the answer is not finite.
_KINKS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "elu": F.elu,
    "hard tanh": lambda x: F.hardtanh(x, 0.0, 1.0),
    "hard swish": lambda x: F.hardswish(x - 3),
    "hard sigmoid": lambda x: F.hardsigmoid(x + 3),
    "soft shrink": lambda x: F.softshrink(x + 0.5),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(0, 1),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "amax": lambda x: x.amax(-1, keepdim=True),
    "max": lambda x: x.max(-1, keepdim=True)[0],
    "median": lambda x: x.median(-1, keepdim=True)[0],
    "sort": lambda x: x.sort(-1)[0],
    "max pool": lambda x: F.max_pool1d(x.unsqueeze(1), 2),
}


@pytest.mark.parametrize("function", _KINKS.values(), ids=_KINKS)
def test_kinks_have_the_derivatives_that_torch_gives_them(function):
    # The value is exactly zero at half of the places, and its tangent is not.
    zero = torch.tensor([1, 1, 0, 0, 1, 0])
    assert_sweep_agrees(
        around(lambda x: torch.cat([function(x - zero * x.detach()).flatten(1), torch.sin(x)], 1), VECTOR)
    )


@pytest.mark.parametrize(
    "operation", ["relu", "convolution", "mul", "mm", "_softmax", "gelu", "max_pool2d_with_indices", "add", "cat"]
)
def test_every_operation_may_go_by_autodiff(monkeypatch, operation):
    # The rule for what has no rule: right for operations that have one.
    monkeypatch.delitem(op_rules._RULES, operation)

    def everything(x):
        x = F.relu(F.conv2d(x, x[0, :1].unsqueeze(0).expand(3, 2, -1, -1)[:, :, :2, :2]))
        x = torch.cat([x, F.gelu(x) * x.mean()], 1)
        return torch.softmax(F.max_pool2d(x, 2).flatten(1), 1) + 1

    assert_sweep_agrees(around(everything, IMAGE))
