"""Time of the sweep of ResNet-20 in the library that Python finds, printed as JSON.

It is run as a file of its own (see `benchmarks/against.py`), and imports nothing of the benchmarks, so that the library
of another checkout can be measured by the same code.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

import lmc_curvature
from lmc_curvature import Objective, Segment, project_hessian

try:
    from lmc_curvature.forking import resnet20
except ImportError:
    from lmc_curvature.sources.resnets import resnet20


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("batch", "width", "pixels", "calls", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = [resnet20(width=options.width).to(options.device) for _ in range(2)]
    x = torch.randn(options.batch, 3, options.pixels, options.pixels).to(options.device)
    y = torch.randint(10, (options.batch,)).to(options.device)
    for model in models:
        with torch.no_grad():
            update_bn([x], model)
        model.eval()
    objective = Objective(models[0], [(x, y)])
    state, directions = objective.state(), Segment(*models).directions()

    def sweep() -> list[list[float]]:
        return project_hessian(objective, state, directions, method="sweep").curvature.tolist()

    # The first call captures the graph and checks itself.
    curvature, seconds = sweep(), []
    for _ in range(options.calls):
        start = time.perf_counter()
        # The result is on the host, so the device has finished.
        sweep()
        seconds.append(time.perf_counter() - start)
    checkout = Path(lmc_curvature.__file__).parents[1]
    print(json.dumps({"checkout": str(checkout), "seconds": statistics.median(seconds), "curvature": curvature}))


if __name__ == "__main__":
    main()
