"""Networks of graphs and of sets."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_curvature import BatchLoss
from tests.support.zoo.specimen import CLASSES, Specimen, classified, labels, numbers

NODES, WIDTH = 5, 4
_EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])


class _Convolution(nn.Module):
    """Graph convolutions by a normalised adjacency matrix, which comes with each example."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, inputs: Any) -> Tensor:
        x, adjacency = inputs
        weights = adjacency / adjacency.sum(-1, keepdim=True).sqrt() / adjacency.sum(-2, keepdim=True).sqrt()
        return (weights @ self.second(torch.relu(weights @ self.first(x)))).mean(1)


class _Attention(nn.Module):
    """Attention of nodes to their neighbours."""

    def __init__(self):
        super().__init__()
        self.value, self.fc = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)
        self.of, self.neighbour = nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, inputs: Any) -> Tensor:
        x, adjacency = inputs
        x = self.value(x)
        scores = F.leaky_relu(self.of(x) + self.neighbour(x).mT, 0.2).masked_fill(adjacency == 0, -torch.inf)
        return self.fc(torch.tanh(scores.softmax(-1) @ x).mean(1))


class _Messages(nn.Module):
    """Messages along edges that all examples have, summed at the nodes."""

    def __init__(self):
        super().__init__()
        self.message, self.update = nn.Linear(2 * WIDTH, 6), nn.GRUCell(6, WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        sources, targets = _EDGES
        for _ in range(2):
            messages = torch.tanh(self.message(torch.cat([x[:, sources], x[:, targets]], -1)))
            summed = messages.new_zeros(*x.shape[:2], 6).index_add(1, targets, messages)
            x = self.update(summed.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        return self.fc(x.mean(1))


class _Batched(nn.Module):
    """Graphs of several sizes, joined into one; the number of graphs is that of the labels, or is read off."""

    def __init__(self, *, reads: bool = False):
        super().__init__()
        self.message, self.fc, self.reads = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES), reads

    def forward(self, inputs: Any) -> Tensor:
        x, edges, graph, ids = inputs["x"], inputs["edges"], inputs["graph"], inputs["ids"]
        x = torch.tanh(self.message(x.index_add(0, edges[1], x[edges[0]])))
        count = int(graph.max()) + 1 if self.reads else len(ids)
        return self.fc(x.new_zeros(count, 6).index_add(0, graph, x))


class _Sparse(nn.Module):
    """A graph convolution by a sparse matrix that is the same for all examples."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)
        self.adjacency = torch.sparse_coo_tensor(_EDGES, torch.ones(7).double(), (NODES, NODES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([torch.sparse.mm(self.adjacency, each) for each in torch.tanh(self.first(x))])
        return self.fc(x.mean(1))


class _Set(nn.Module):
    """A function of each element, and one of their sum and of their largest."""

    def __init__(self):
        super().__init__()
        self.each, self.all = nn.Linear(WIDTH, 6), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.each(x))
        return self.all(torch.cat([x.sum(1), x.amax(1)], -1))


class _Points(nn.Module):
    """Nearest neighbours among points, found anew in every layer, as in dynamic graph networks."""

    def __init__(self):
        super().__init__()
        self.edge, self.fc = nn.Linear(2 * WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, x).topk(3, largest=False).indices
        examples = torch.arange(x.shape[0])[:, None, None]
        around = x[examples, nearest]
        edges = torch.cat([x.unsqueeze(2).expand_as(around), around - x.unsqueeze(2)], -1)
        return self.fc(torch.tanh(self.edge(edges)).amax(2).mean(1))


def _graphs(generator: torch.Generator) -> Any:
    edges = (torch.rand(3, NODES, NODES, generator=generator) < 0.5).double() + torch.eye(NODES)
    return (numbers(generator, 3, NODES, WIDTH), edges), labels(generator, 3)


def _joined(generator: torch.Generator) -> Any:
    graph = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    inputs = {"x": numbers(generator, 9, WIDTH), "edges": torch.tensor([[0, 1, 3, 5, 6, 8], [1, 2, 4, 6, 7, 5]])}
    return inputs | {"graph": graph, "ids": torch.arange(3)}, labels(generator, 3)


_LOSS = {
    "cross-entropy": BatchLoss(
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), size=lambda batch: len(batch[1])
    )
}
_ONE_GRAPH = classified(NODES, WIDTH)
GRAPHS = {
    "graph convolution": Specimen("graphs", _Convolution, _graphs),
    "graph attention": Specimen("graphs", _Attention, _graphs),
    "message passing": Specimen("graphs", _Messages, _ONE_GRAPH),
    "graphs joined into one": Specimen("graphs", _Batched, _joined, _LOSS),
    "graphs joined into one, counted": Specimen("graphs", lambda: _Batched(reads=True), _joined, _LOSS),
    "sparse adjacency": Specimen("graphs", _Sparse, _ONE_GRAPH),
    "nearest neighbours": Specimen("graphs", _Points, _ONE_GRAPH),
    "Deep Sets": Specimen("graphs", _Set, _ONE_GRAPH),
}
