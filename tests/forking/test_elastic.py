"""Claim: when a rank is killed, torchrun starts the laboratory again, and that ends with an undisturbed run's bits."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from lmc_curvature.forking import load_config, run_forks
from tests.support.configurations import SECONDS
from tests.support.experiments import contents


@pytest.mark.check
def test_a_killed_rank_is_started_again_and_goes_on(tmp_path):
    file, out = tmp_path / "config.yaml", tmp_path / "elastic"
    file.write_text(SECONDS.replace("epochs: 2", "epochs: 12"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["-m", "lmc_curvature", "fork", str(file), "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        end = time.monotonic() + 240
        while not list(out.glob("parent/epoch-*.safetensors")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        next(rank for rank in psutil.Process(process.pid).children() if "lmc_curvature" in rank.cmdline()).kill()
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors
    assert said.split() == f"trained: {out}; next: lmc-curvature trace {out}".split()
    run_forks(load_config(file), tmp_path / "undisturbed", progress=False)
    assert contents(out) == contents(tmp_path / "undisturbed")
