"""Networks whose output for an example depends on the others in its batch, in ways that are hard to see."""

import torch

from tests.support.sweeping import TwoLayers


class ByTheMean(TwoLayers):
    """Subtracts the mean over the batch, in evaluation mode too."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) - self.first(x).mean(0)))


class ByAGate(TwoLayers):
    """Adds the mean over the batch with a weight that is zero at first."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden + self.gate * hidden.mean(0))


class ByNearness(TwoLayers):
    """Adds up the hidden units of inputs that are near each other."""

    def forward(self, x):
        near = ((x[:, None] - x).norm(dim=-1) < 0.1).to(x.dtype)
        return self.second(torch.tanh(near @ self.first(x)))


class ByMarks(TwoLayers):
    """Adds up the hidden units of inputs with the same mark, in their first column."""

    def forward(self, x):
        same = (x[:, :1] == x[:, 0]).to(x.dtype)
        return self.second(torch.tanh(same @ self.first(x)))


class ByCount(TwoLayers):
    """Divides by the number of examples."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) / x.shape[0])
