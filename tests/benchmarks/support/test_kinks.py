import torch

from benchmarks.support.kinks import far_from_kinks


def test_examples_near_a_kink_are_left_out():
    layer = torch.nn.Linear(200, 1, bias=False)
    weight, vector = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(weight.unsqueeze(0))
    # The second one is at right angles: what is left of its terms is their rounding.
    x = torch.stack([weight, vector - (vector @ weight) / (weight @ weight) * weight, -weight])
    assert far_from_kinks(torch.nn.Sequential(layer, torch.nn.ReLU()), x, 2).tolist() == [0, 2]
