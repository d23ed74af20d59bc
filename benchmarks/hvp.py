"""How fast is one exact Hessian-vector product, and which way of taking the second derivative is fastest?

Times every road on the same network and batch, in multiples of F, the network's own forward pass without gradients.
Prints a table and writes JSON:

    python benchmarks/hvp.py [--device cuda] [--quick] [--out runs/benchmarks]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.func import grad, jvp, vjp
from torch.utils.benchmark import Timer

from lmc_curvature import HessianOperator, Objective, Segment, project_hessian
from lmc_curvature.batches import Batch
from lmc_curvature.curvature.hessian import BatchGradient
from lmc_curvature.forking.models import resnet20


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smaller batch, timed more briefly")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()

    setting = {
        "network": "resnet20",
        "batch": 32 if options.quick else 128,
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    roads = hvp_roads(setting["batch"], options.device)
    seconds = {name: median_seconds(run, 0.5 if options.quick else 4.0) for name, run in roads.items()}
    forward = seconds["forward pass, no gradient (F)"]
    rows = {name: {"seconds": value, "F": value / forward} for name, value in seconds.items()}

    table = Table("road", "ms", "F", title=", ".join(f"{key} {value}" for key, value in setting.items()))
    for name, row in rows.items():
        table.add_row(name, f"{1000 * row['seconds']:.1f}", f"{row['F']:.1f}")
    Console(width=120).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hvp.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


def hvp_roads(batch_size: int, device: str) -> dict[str, Callable[[], Any]]:
    """Name to a function that does the work once, all on one network, batch and vector."""
    torch.manual_seed(0)
    models = [resnet20().to(device) for _ in range(2)]
    x = torch.randn(batch_size, 3, 32, 32, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    objective, batch = Objective(models[0], [(x, y)]), Batch(0, batch_size, (x, y))
    state, network = objective.state(), models[0].eval()
    vector = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    directions = Segment(*models).directions()
    kept = BatchGradient(objective, state, batch)

    def loss(point: dict[str, torch.Tensor]) -> torch.Tensor:
        return objective.batch_loss(point, batch)

    def forward() -> None:
        with torch.no_grad():
            network(x)

    return {
        "forward pass, no gradient (F)": forward,
        "gradient": lambda: grad(loss)(state),
        "product, forward over reverse (torch.func)": lambda: jvp(grad(loss), (state,), (vector,)),
        "product, reverse over reverse (torch.func)": lambda: vjp(grad(loss), state)[1](vector),
        "product, HessianOperator @ v": lambda: HessianOperator(objective) @ vector,
        "graph of a batch's gradient": lambda: BatchGradient(objective, state, batch),
        "further product on that graph": lambda: kept.product(vector),
        f"projection onto {len(directions)} layers, method='hvp'": lambda: project_hessian(
            objective, state, directions, method="hvp"
        ),
    }


def median_seconds(run: Callable[[], Any], min_run_time: float) -> float:
    """Median time of a call, after a warm-up call; `Timer` waits for the device."""
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


if __name__ == "__main__":
    main()
