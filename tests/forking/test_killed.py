"""SIGKILL at random moments, again and again: the same command ends with the bits of an undisturbed run."""

import multiprocessing
import random
import signal
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
# Processes start in no time from one that has imported what they need.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lmc_curvature.forking.experiment", "lmc_curvature.tracing.trace", __name__])


def work(path, what, workers, together):
    """Train or trace, and leave a state after every epoch."""
    if what == "train":
        run_forks(CONFIG, path, workers=workers, together=together, save_seconds=0.0, progress=False)
    else:
        trace_forks(path, workers=workers, progress=False)


KILLS = 3


def trace_files(path):
    return len(list(path.glob("traces/fork-*/epoch-*/*.safetensors")))


def run_and_kill(path, what, seconds, workers=1, together=1, *, after_a_trace=False):
    """Start the work, kill it some time after it begins, or after a trace, and return whether it was still at it."""
    before = trace_files(path)
    process = SERVER.Process(target=work, args=(path, what, workers, together))
    process.start()
    while after_a_trace and process.is_alive() and trace_files(path) == before:
        time.sleep(0.01)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    run_forks(CONFIG, path, progress=False)
    trace_forks(path, progress=False)
    return path


@pytest.mark.check
@pytest.mark.parametrize(("workers", "together"), [(1, 1), (2, 1), (1, 3)])
def test_training_and_tracing_survive_being_killed(undisturbed, tmp_path, workers, together):
    moments = random.Random(workers)
    killed = {"train": 0, "trace": 0, "in the midst": 0}
    whole = trace_files(undisturbed)
    for what in ("train", "trace"):
        for number in range(KILLS):
            # Some before there is a trace, some with a few.
            late = what == "trace" and number > 0
            seconds = moments.uniform(0.0, 0.5) if late else moments.uniform(0.05, 1.2)
            killed[what] += run_and_kill(tmp_path / "killed", what, seconds, workers, together, after_a_trace=late)
            killed["in the midst"] += 0 < trace_files(tmp_path / "killed") < whole
        assert not run_and_kill(tmp_path / "killed", what, 600, workers, together)
    # Most kills hit while there was work left.
    assert min(killed.values()) >= 2
    assert contents(tmp_path / "killed") == contents(undisturbed)
