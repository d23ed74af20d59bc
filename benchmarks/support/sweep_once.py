"""Sweeps of a network in the library that Python finds, timed one at a time.

It prints a line of JSON: the matrix, and the operators that a sweep calls; and then, for every line that it reads, the
seconds of another sweep. The first one, which captures and checks, is not among them.

It is run as a file of its own (see `benchmarks/against.py`), and imports nothing of the benchmarks, so that the library
of another checkout can be measured by the same code.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.profiler import ProfilerActivity, profile

import lmc_curvature
from lmc_curvature import BatchLoss, Objective, Segment, project_hessian
from lmc_curvature.sources.resnets import resnet

# Two files that import torch alone, without the folder on the path, where the names of others would hide packages.
_GPT2, _KINKS = (runpy.run_path(str(Path(__file__).with_name(name))) for name in ("gpt2.py", "kinks.py"))


def main() -> None:
    """Parse, print what is found once, and a time for each line."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    calls = operator_calls(sweep_of(options, options.tile))
    sweep = sweep_of(options, options.batch)
    found = {"checkout": str(Path(lmc_curvature.__file__).parents[1]), "curvature": sweep(), "calls": calls}
    print(json.dumps(found), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        # The result is on the host, so the device has finished.
        sweep()
        print(time.perf_counter() - start, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", required=True, help="resnet20, resnet56, …, or gpt2")
    for name in ("batch", "tile", "width", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("pixels", "layers", "heads", "vocabulary", "tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", required=True)
    return parser


def sweep_of(options: argparse.Namespace, examples: int) -> Callable[[], list[list[float]]]:
    """The function that sweeps a batch of some examples."""
    torch.manual_seed(0)
    make = _language if options.network == "gpt2" else _images
    models, batch, settings = make(options, examples)
    objective = Objective(models[0], [batch], **settings)
    state, directions = objective.state(), Segment(*models).directions()
    return lambda: project_hessian(objective, state, directions, method="sweep").curvature.tolist()


def _images(options: argparse.Namespace, examples: int) -> tuple[list[nn.Module], Any, dict[str, Any]]:
    depth = int(options.network.removeprefix("resnet"))
    models = [resnet(depth, width=options.width).to(options.device) for _ in range(2)]
    x = torch.randn(2 * options.batch, 3, options.pixels, options.pixels).to(options.device)
    y = torch.randint(10, (examples,)).to(options.device)
    # Those of a few images would make deep networks wild.
    for model in models:
        with torch.no_grad():
            update_bn([x], model)
        model.eval()
    # At a kink of a ReLU the two checkouts would differ by more than rounding.
    return models, (x[_KINKS["far_from_kinks"](models[0], x, examples)], y), {}


def _language(options: argparse.Namespace, examples: int) -> tuple[list[nn.Module], Any, dict[str, Any]]:
    sizes = {name: getattr(options, name) for name in ("layers", "width", "heads", "vocabulary")}
    models = [_GPT2["GPT2"](**sizes, positions=options.tokens).to(options.device).eval() for _ in range(2)]
    tokens, following = _GPT2["random_tokens"](examples, options.tokens, options.vocabulary)
    loss = BatchLoss(_GPT2["next_token_loss"], size=lambda batch: batch[1].numel())
    return models, (tokens.to(options.device), following.to(options.device)), {"loss_fn": loss}


def operator_calls(run: Callable[[], Any]) -> int:
    """The operators that a call, after the first, calls on the host, those within others among them."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return sum(event.count for event in recorded.key_averages() if "::" in event.key)


if __name__ == "__main__":
    main()
