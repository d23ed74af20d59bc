"""Claim: functions that look at numbers are written out, with the same values, and are swept right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lmc_curvature import Objective, project_hessian
from lmc_curvature.errors import FallbackWarning, LossError
from tests.support.capturing import captured_right, numbers
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, assert_sweep_agrees, layer_directions

LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, proj_size=2),
    "LSTM without biases": lambda: nn.LSTM(3, 4, bias=False, batch_first=True),
    "GRU": lambda: nn.GRU(3, 4, bidirectional=True),
    "RNN": lambda: nn.RNN(3, 4, num_layers=2),
    "RNN with rectifiers": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}


@pytest.mark.parametrize("lengths", [[5, 2, 4], [3, 3, 1]], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_value": 0.5}, {"total_length": 7}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_packing_and_padding_are_those_of_torch(lengths, options, batch_first):
    def function(w, x):
        packed = pack_padded_sequence(x @ w, lengths, batch_first=batch_first, enforce_sorted=False)
        changed = PackedSequence(torch.tanh(packed.data), *packed[1:])
        padded, found = pad_packed_sequence(changed, batch_first=batch_first, **options)
        return padded * found.sum()

    x = numbers(3, 5, 2) if batch_first else numbers(5, 3, 2)
    captured_right(function, [numbers(2, 3)], [x])


class _Packed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        width = layer.proj_size or layer.hidden_size
        self.fc = nn.Linear(width * (1 + layer.bidirectional), 3)

    def forward(self, x):
        x = x if self.layer.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, [5, 2, 4], batch_first=self.layer.batch_first, enforce_sorted=False)
        output, state = self.layer(packed)
        padded = pad_packed_sequence(output, batch_first=True)[0]
        return self.fc(padded).sum(1) + (state[0] if isinstance(state, tuple) else state)[-1, :, :1]


@pytest.mark.check(after=2)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_recurrent_layers_of_packed_sequences(make):
    batches = [(numbers(3, 5, 3, seed=seed), torch.arange(3)) for seed in (0, 1)]
    assert_sweep_agrees(Objective(randomized(_Packed(make()).double()), batches))


@pytest.mark.parametrize("call", [lambda y: F.one_hot(y, 4), lambda y: F.one_hot(y, num_classes=3)])
def test_classes_as_vectors(call):
    y = torch.tensor([[0, 2], [1, 1]])
    stages = captured_right(lambda w, x, y: (x @ w) * call(y).sum((0, 1))[0], [numbers(2, 3)], [numbers(4, 2), y])
    assert not any("eq" in str(node.target) for node in stages[1].operations)


def test_classes_out_of_range_are_no_vectors():
    def loss(output, target):
        return F.mse_loss(output, F.one_hot(target, 3).double())

    x, y = numbers(4, 5), torch.tensor([0, 1, 2, 1])
    objective = Objective(randomized(TwoLayers().double()), [(x, y), (x, y - 1)], loss_fn=loss)
    with pytest.warns(FallbackWarning, match="scatter"), pytest.raises(LossError, match="non-negative"):
        project_hessian(objective, {}, layer_directions(objective))
