"""Find the layers that stand between two networks, and the pairs of layers that add to the barrier together.

python examples/which_layers.py
"""

import copy

import numpy as np
import torch

from lmc_curvature import measure_barrier, predict_barrier
from lmc_curvature.forking import TrainingConfig, train
from lmc_curvature.sources import digits_resnet, load_digits

torch.manual_seed(0)
digits = load_digits()
schedule = TrainingConfig(epochs=10, learning_rate=0.3, milestones=(8,), weight_decay=0.001, batch_size=32)
model_a = digits_resnet(width=4)
model_b = copy.deepcopy(model_a)
for order_seed, model in enumerate((model_a, model_b)):
    train(model, digits, schedule, order_seed=order_seed)

loader = digits.batches(256)
prediction = predict_barrier(model_a, model_b, loader)
measurement = measure_barrier(model_a, model_b, loader, sets="each", alphas=5)

table = prediction.to_dataframe()[["layer", "distance", "hessian_energy", "barrier"]]
print(
    table.assign(measured=measurement.layer_barriers()).sort_values("barrier", ascending=False).to_string(index=False)
)

between = np.triu(prediction.interactions, k=1)
first, second = np.unravel_index(between.argmax(), between.shape)
pair = [prediction.layers[first], prediction.layers[second]]
alone = sum(prediction.barrier([layer]) for layer in pair)
print(f"{' and '.join(pair)} interact most: {prediction.barrier(pair):.3g} together, {alone:.3g} one by one")
