import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmc_curvature.errors import OptionError
from lmc_curvature.forking import TrainingState, run_forks


def test_tensorboard_events_are_the_metrics(finished, config, tmp_path):
    run_forks(config, tmp_path / "forks", tensorboard=tmp_path / "events", progress=False)
    events = EventAccumulator(str(tmp_path / "events" / "fork-0002" / "child-1")).Reload()
    last = TrainingState.load(finished.child(2, 1).snapshot_path(3)).history[-1]
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        name: [(3, pytest.approx(getattr(last, name), rel=1e-6))] for name in ("learning_rate", "loss", "accuracy")
    }


def test_tensorboard_that_is_missing_is_named_before_anything_starts(config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"package tensorboard: pip install lmc-curvature\[tensorboard\]"):
        run_forks(config, tmp_path / "forks", tensorboard=tmp_path / "events", progress=False)
    assert not (tmp_path / "forks").exists()
