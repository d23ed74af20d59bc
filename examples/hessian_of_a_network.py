"""Multiply with the exact Hessian of a trained network; find its largest eigenvalues, its trace and its spectrum.

python examples/hessian_of_a_network.py
"""

import torch

from lmc_curvature import HessianOperator, Objective, spectral_density, top_eigenpairs, trace
from lmc_curvature.forking import TrainingConfig, train
from lmc_curvature.sources import digits_resnet, load_digits

torch.manual_seed(0)
digits = load_digits()
model = digits_resnet(width=2)
train(model, digits, TrainingConfig(epochs=4, learning_rate=0.1), order_seed=0)

objective = Objective(model, digits.subset(256).batches(128))
H = HessianOperator(objective)
v = torch.randn(H.shape[1])
print(f"{H.shape[0]} coordinates; vᵀHv = {float(v @ (H @ v)):.4g}")
print("of the last layer alone:", H.block("linear").to_dense().shape)

pairs = top_eigenpairs(H, 5)
print("largest eigenvalues:", pairs.values, "relative residuals:", pairs.residuals)

estimate = trace(H)
print(f"trace {estimate.value:.4g} ± {estimate.standard_error:.2g}")

density = spectral_density(H, probes=2, steps=32)
share = density.weights[density.nodes > 1].sum() / density.weights.sum()
print(f"{share:.1%} of the eigenvalues are above 1; their mean is {density.moment(1).value:.3g}")
