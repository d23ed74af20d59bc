"""The configuration of a forking experiment that takes seconds, as a file would have it."""

SECONDS = """
training: {epochs: 2, learning_rate: 0.1, batch_size: 50}
fork_epochs: [0]
snapshot_epochs: 1
limit: 100
model_options: {width: 2}
threads: 1
trace: {batch_size: 100, alphas: 3, layer_alphas: 3, test: false}
"""
