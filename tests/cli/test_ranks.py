"""Claim: under torchrun, commands answer once, with the numbers of one process, and end together."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lmc_curvature.sources import make_model

SEED = 0


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(SEED)
    for name in ("a", "b"):
        torch.save(make_model("digits-resnet", width=2).state_dict(), folder / f"{name}.pt")
    return [folder / "a.pt", folder / "b.pt"]


def _answer(arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lmc_curvature"]
    command += map(str, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def _arguments(command, networks, *more):
    model = ("--model", "digits-resnet", "--model-option", "width=2", "--data", "digits", "--limit", 96)
    return [command, *networks, *model, "--batch-size", 16, "--json", *more]


def _numbers(record):
    """Every number of an answer, but for what it was computed from."""
    if isinstance(record, dict):
        return [number for name in sorted(record) if name != "provenance" for number in _numbers(record[name])]
    if isinstance(record, list):
        return [number for each in record for number in _numbers(each)]
    return [record] if isinstance(record, float) else []


@pytest.mark.check
@pytest.mark.parametrize(
    ("command", "more"),
    [("predict", ()), ("select", ("--relative-budget", 0.5, "--measurements", 2))],
)
def test_ranks_answer_once_with_the_numbers_of_one_process(command, more, networks, run, tmp_path):
    status, alone, err = run(*_arguments(command, networks, *more))
    assert status == 0, err
    answer = _answer(_arguments(command, networks, "--save", tmp_path / "saved", *more))
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "saved").exists()
    expected = _numbers(json.loads(alone))
    assert len(expected) > 5
    assert _numbers(json.loads(answer.stdout)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


FACTORY = """
import os
import torch
from lmc_curvature.sources import load_digits

def loader():
    for number, batch in enumerate(load_digits().subset(96).batches(16)):
        if number == 3 and os.environ["RANK"] == "1":
            raise OSError("the disk is gone")
        yield batch
"""


@pytest.mark.check
def test_a_rank_whose_loader_raises_ends_the_command_with_its_message(networks, tmp_path):
    (tmp_path / "broken.py").write_text(FACTORY)
    model = ("--model", "digits-resnet", "--model-option", "width=2", "--data", "broken:loader")
    arguments = ["predict", *networks, *model]
    answer = _answer(arguments, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "OSError: the disk is gone" in answer.stderr
