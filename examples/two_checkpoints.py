"""Predict the loss barrier between two checkpoints from their curvature, and measure it.

python examples/two_checkpoints.py
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lmc_curvature import measure_barrier, predict_barrier
from lmc_curvature.forking import TrainingConfig, train
from lmc_curvature.sources import digits_resnet, load_digits

torch.manual_seed(0)
digits = load_digits()
parent = digits_resnet(width=4)
schedule = TrainingConfig(epochs=10, learning_rate=0.3, milestones=(8,), weight_decay=0.001, batch_size=32)

with TemporaryDirectory() as folder:
    # Two copies of one network see the same images in different orders.
    paths = [Path(folder) / name for name in ("a.pt", "b.pt")]
    for order_seed, path in enumerate(paths):
        child = copy.deepcopy(parent)
        train(child, digits, schedule, order_seed=order_seed)
        torch.save(child.state_dict(), path)

    model_a, model_b = digits_resnet(width=4), digits_resnet(width=4)
    for model, path in zip((model_a, model_b), paths, strict=True):
        model.load_state_dict(torch.load(path, weights_only=True))

loader = digits.batches(256)  # any loader of (x, y) batches, visited once by each of the two calls
prediction = predict_barrier(model_a, model_b, loader)
measurement = measure_barrier(model_a, model_b, loader)
print(prediction)
print(measurement)
