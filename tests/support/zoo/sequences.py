"""Recurrent networks, packed sequences, transformers with masks, and networks in the domain of frequencies."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.support.cases import Recurrent
from tests.support.networks import SelfAttention, TwoWayLSTM
from tests.support.zoo.specimen import (
    CLASSES,
    CROSS_ENTROPY,
    REGRESSION,
    Specimen,
    classified,
    labels,
    numbers,
    regressed,
)

STEPS, WIDTH = 4, 3
_SEQUENCE = classified(STEPS, WIDTH)


class _ReadOut(nn.Module):
    """A recurrent layer and a linear one of its output at the last step."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(8 if layer.bidirectional else 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x)[0][:, -1])


class _Cell(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell: type[nn.Module]):
        super().__init__()
        self.cell, self.fc = cell(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


class _Packed(nn.Module):
    """A recurrent layer of packed sequences, unpacked again and averaged."""

    def __init__(self, layer: nn.RNNBase, lengths: list[int] | None = None):
        super().__init__()
        self.layer, self.lengths = layer, lengths
        self.fc = nn.Linear(8 if layer.bidirectional else 4, CLASSES)

    def forward(self, inputs: Any) -> Tensor:
        x, lengths = inputs if self.lengths is None else (inputs, self.lengths)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.fc(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].mean(1))


class _PackedTokens(nn.Module):
    """Takes packed sequences for a shorter list of tokens, without a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Any) -> Tensor:
        packed = pack_padded_sequence(*inputs, batch_first=True, enforce_sorted=False)
        hidden = PackedSequence(torch.tanh(self.first(packed.data)), *packed[1:])
        return self.second(pad_packed_sequence(hidden, batch_first=True, total_length=STEPS)[0].mean(1))


class _Masked(nn.Module):
    """A recurrent layer read out at the last step of every example, which a mask of its own would say."""

    def __init__(self):
        super().__init__()
        self.layer, self.fc = nn.GRU(WIDTH, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, inputs: Any) -> Tensor:
        x, lengths = inputs
        places = (lengths - 1)[:, None, None].expand(-1, 1, 4)
        return self.fc(self.layer(x)[0].gather(1, places).squeeze(1))


def _with_lengths(generator: torch.Generator) -> Any:
    # Of one sum, so that the shapes of packed data are those of the other batch.
    lengths = torch.tensor([4, 2, 3])[torch.randperm(3, generator=generator)]
    return (numbers(generator, 3, STEPS, WIDTH), lengths), labels(generator, 3)


def _with_list(generator: torch.Generator) -> Any:
    return (numbers(generator, 3, STEPS, WIDTH), [4, 2, 3]), labels(generator, 3)


class _Translator(nn.Module):
    """Torch's transformer, whose decoder sees the past alone."""

    def __init__(self, mask: str):
        super().__init__()
        self.network = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)
        self.fc = nn.Linear(4, CLASSES)
        self.mask = mask
        past = nn.Transformer.generate_square_subsequent_mask(STEPS)
        self.register_buffer("past", past < 0 if mask == "kept" else past)

    def forward(self, inputs: Any) -> Tensor:
        x, given = inputs if self.mask == "given" else (inputs, None)
        made = nn.Transformer.generate_square_subsequent_mask(STEPS, dtype=x.dtype)
        mask = {"given": given, "made": made}.get(self.mask, self.past)
        return self.fc(self.network(x, x.flip(1), src_mask=mask, tgt_mask=mask).mean(1))


class _Encoder(nn.Module):
    """Torch's encoder, where the ends of some examples are padding."""

    def __init__(self):
        super().__init__()
        self.network = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, inputs: Any) -> Tensor:
        x, padding = inputs
        return self.fc(self.network(x, src_key_padding_mask=padding)[:, 0])


def _padded(generator: torch.Generator) -> Any:
    ends = torch.randint(1, STEPS + 1, (3, 1), generator=generator)
    return (numbers(generator, 3, STEPS, 4), torch.arange(STEPS) >= ends), labels(generator, 3)


def _with_mask(generator: torch.Generator) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(STEPS, dtype=torch.float64)
    return (numbers(generator, 3, STEPS, 4), mask), labels(generator, 3)


SEQUENCES = {
    **{
        name: Specimen("recurrent", lambda make=make: _ReadOut(make()), _SEQUENCE)
        for name, make in {
            "RNN": lambda: nn.RNN(WIDTH, 4, batch_first=True),
            "GRU, two-way": lambda: nn.GRU(WIDTH, 4, bidirectional=True, batch_first=True),
            "LSTM, projected": lambda: nn.LSTM(WIDTH, 6, proj_size=4, batch_first=True),
        }.items()
    },
    "LSTM": Specimen("recurrent", Recurrent, _SEQUENCE, CROSS_ENTROPY),
    "LSTM, two-way, two layers": Specimen("recurrent", TwoWayLSTM, _SEQUENCE, CROSS_ENTROPY),
    "LSTM cell": Specimen("recurrent", lambda: _Cell(nn.LSTMCell), _SEQUENCE, CROSS_ENTROPY),
    "GRU, read out where sequences end": Specimen("recurrent", _Masked, _with_lengths, CROSS_ENTROPY),
    "packed LSTM, lengths known": Specimen(
        "recurrent", lambda: _Packed(nn.LSTM(WIDTH, 4, 2, batch_first=True), [4, 2, 3]), _SEQUENCE, CROSS_ENTROPY
    ),
    "packed GRU, two-way, lengths as plain numbers": Specimen(
        "recurrent", lambda: _Packed(nn.GRU(WIDTH, 4, bidirectional=True, batch_first=True)), _with_list, CROSS_ENTROPY
    ),
    "packed LSTM, lengths as a tensor": Specimen(
        "recurrent", lambda: _Packed(nn.LSTM(WIDTH, 4, batch_first=True)), _with_lengths, CROSS_ENTROPY
    ),
    "packed tokens, lengths as a tensor": Specimen("recurrent", _PackedTokens, _with_lengths, CROSS_ENTROPY),
    "multi-head attention": Specimen("attention", SelfAttention, classified(STEPS, 4), CROSS_ENTROPY),
    "encoder with padding": Specimen("attention", _Encoder, _padded, CROSS_ENTROPY),
    "Transformer, tgt_mask made": Specimen(
        "attention", lambda: _Translator("made"), classified(STEPS, 4), CROSS_ENTROPY
    ),
    "Transformer, tgt_mask kept": Specimen(
        "attention", lambda: _Translator("kept"), classified(STEPS, 4), CROSS_ENTROPY
    ),
    "Transformer, tgt_mask kept as an entry": Specimen(
        "attention", lambda: _Translator("entry"), classified(STEPS, 4), CROSS_ENTROPY
    ),
    "Transformer, tgt_mask in the batch": Specimen(
        "attention", lambda: _Translator("given"), _with_mask, CROSS_ENTROPY
    ),
}


# --- Frequencies


class _Spectral(nn.Module):
    """A layer of a Fourier neural operator: lowest frequencies are mixed by complex weights, the others dropped."""

    def __init__(self, *, is_complex: bool):
        super().__init__()
        self.before, self.after, self.skip = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 1, 1), nn.Conv1d(4, 4, 1)
        weight = torch.randn(4, 4, 3, 2) / 4
        self.weight = nn.Parameter(torch.view_as_complex(weight) if is_complex else weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        frequencies = torch.fft.rfft(x)
        mixed = torch.zeros_like(frequencies)
        mixed[..., :3] = torch.einsum("bik,iok->bok", frequencies[..., :3], weight)
        return self.after(F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.skip(x)))


class _GlobalFilter(nn.Module):
    """Multiplies the frequencies of an image by weights, as GFNet does."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(2, 4, 1), nn.Linear(4, CLASSES)
        self.weight = nn.Parameter(0.5 * torch.randn(4, 6, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft2(self.stem(x), norm="ortho") * torch.view_as_complex(self.weight)
        return self.fc(torch.tanh(torch.fft.irfft2(frequencies, s=x.shape[-2:], norm="ortho")).mean((2, 3)))


class _Mixing(nn.Module):
    """Takes the real part of the frequencies of a sequence for what attention would be, as FNet does."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.tanh(self.norm(x + torch.fft.fft2(x, norm="ortho").real)).mean(1))


class _AutoCorrelation(nn.Module):
    """Weighs delays of a sequence by its correlation with itself, as Autoformer does."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (torch.fft.rfft(layer(x), dim=1) for layer in (self.query, self.key))
        delays = torch.fft.irfft(query * key.conj(), n=x.shape[1], dim=1).mean(2).softmax(1)
        value = self.value(x)
        moved = torch.stack([value.roll(-delay, 1) for delay in range(x.shape[1])], 1)
        return self.fc((delays[:, :, None, None] * moved).sum(1).tanh().mean(1))


class _StateSpace(nn.Module):
    """A diagonal state-space layer with complex modes, convolved by Fourier transforms, as S4D is."""

    def __init__(self):
        super().__init__()
        self.decay, self.frequency = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.read, self.fc = nn.Parameter(torch.randn(4, 2)), nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.complex(-self.decay.exp(), self.frequency)
        steps = torch.arange(x.shape[-1], dtype=x.dtype)
        kernel = (torch.view_as_complex(self.read)[:, None] * torch.exp(modes[:, None] * steps)).sum(0).real
        size = 2 * x.shape[-1]
        y = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size), n=size)[..., : x.shape[-1]]
        return self.fc(torch.tanh(y).mean(-1, keepdim=True))


class _Spectrogram(nn.Module):
    """Magnitudes of short-time Fourier transforms of a filtered signal."""

    def __init__(self):
        super().__init__()
        self.filter, self.fc = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(5, CLASSES)
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: Tensor) -> Tensor:
        signal = self.filter(x[:, None])[:, 0]
        found = torch.stft(signal, 8, 4, window=self.window, return_complex=True)
        return self.fc(torch.log1p(found.abs()).mean(2))


class _ComplexLinear(nn.Module):
    """Linear layers of complex numbers, with a modulus at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, n, 2) / 2) for n in (4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.view_as_complex(self.first), torch.view_as_complex(self.second)
        hidden = torch.tanh(torch.complex(x, x.flip(1)) @ first)
        return (hidden @ second).abs()


class _Features(nn.Module):
    """Random Fourier features of coordinates, as in implicit images."""

    def __init__(self):
        super().__init__()
        self.frequencies, self.fc = nn.Parameter(torch.randn(2, 4)), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x @ self.frequencies
        return self.fc(torch.cat([angles.sin(), angles.cos()], -1))


_SIGNALS = regressed((1, 8), (1, 8))
FREQUENCIES = {
    "Fourier neural operator": Specimen("Fourier", lambda: _Spectral(is_complex=False), _SIGNALS, REGRESSION),
    "Fourier neural operator, complex parameters": Specimen(
        "Fourier", lambda: _Spectral(is_complex=True), _SIGNALS, REGRESSION
    ),
    "GFNet": Specimen("Fourier", _GlobalFilter, classified(2, 6, 6)),
    "FNet mixing": Specimen("Fourier", _Mixing, classified(STEPS, 4)),
    "auto-correlation": Specimen("Fourier", _AutoCorrelation, classified(STEPS, 4)),
    "S4D": Specimen("Fourier", _StateSpace, classified(8)),
    "spectrogram": Specimen("Fourier", _Spectrogram, classified(16)),
    "complex perceptron": Specimen("Fourier", _ComplexLinear, classified(4)),
    "Fourier features": Specimen("Fourier", _Features, classified(2)),
}
