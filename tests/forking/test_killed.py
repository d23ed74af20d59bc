"""SIGKILL at random moments, again and again: the same command ends with the bits of an undisturbed run."""

import random
import subprocess
import sys
import time

import pytest

from lmc_curvature.forking import ForkConfig, run_forks
from lmc_curvature.tracing import trace_forks
from tests.support.experiments import contents

CONFIG = ForkConfig(
    training={"epochs": 6, "learning_rate": 0.1, "batch_size": 32, "augmentation": "crop-flip"},
    fork_epochs=[0, 3],
    snapshot_epochs=2,
    limit=600,
    model_options={"width": 2},
    threads=1,
    trace={"batch_size": 300, "alphas": 3, "layer_alphas": 3, "layers": "last", "cumulative": "last"},
)
# Says when it begins to work, and leaves a state after every epoch.
PROGRAM = """
import sys
from lmc_curvature.forking import ForkConfig, run_forks
from lmc_curvature.tracing import trace_forks
config, out, what, workers, together = sys.argv[1:]
print("begins", flush=True)
if what == "train":
    config = ForkConfig.model_validate_json(config)
    run_forks(config, out, workers=int(workers), together=int(together), save_seconds=0.0, progress=False)
else:
    trace_forks(out, workers=int(workers), progress=False)
"""
KILLS = 4


def trace_files(path):
    return len(list(path.glob("traces/fork-*/epoch-*/*.safetensors")))


def run_and_kill(tmp_path, what, seconds, workers=1, together=1, *, after_a_trace=False):
    """Start the work, kill it some time after it begins, or after a trace, and return whether it was still at it."""
    before = trace_files(tmp_path / "killed")
    script = tmp_path / "program.py"
    script.write_text(f"if __name__ == '__main__':\n    {PROGRAM.strip().replace(chr(10), chr(10) + '    ')}\n")
    command = [sys.executable, script, CONFIG.model_dump_json(), tmp_path / "killed", what, str(workers), str(together)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        while after_a_trace and process.poll() is None and trace_files(tmp_path / "killed") == before:
            time.sleep(0.01)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait() == -9


@pytest.mark.check
@pytest.mark.parametrize(("workers", "together"), [(1, 1), (2, 1), (1, 3)])
def test_training_and_tracing_survive_being_killed(tmp_path, workers, together):
    run_forks(CONFIG, tmp_path / "undisturbed", progress=False)
    trace_forks(tmp_path / "undisturbed", progress=False)
    moments = random.Random(workers)
    killed = {"train": 0, "trace": 0, "in the midst": 0}
    whole = trace_files(tmp_path / "undisturbed")
    for what in ("train", "trace"):
        for number in range(KILLS):
            # Some before there is a trace, some with a few.
            late = what == "trace" and number > 0
            seconds = moments.uniform(0.0, 0.5) if late else moments.uniform(0.05, 1.2)
            killed[what] += run_and_kill(tmp_path, what, seconds, workers, together, after_a_trace=late)
            killed["in the midst"] += 0 < trace_files(tmp_path / "killed") < whole
        assert not run_and_kill(tmp_path, what, 600, workers, together)
    # Most kills hit while there was work left.
    assert min(killed.values()) >= 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
