import torch

from benchmarks.support import timing


def test_roads_take_turns_between_forward_passes():
    calls = []

    def named(name):
        return lambda: calls.append(name)

    forward = named("F")
    roads = [timing.Road(name, named(name), forward) for name in "ab"]
    found = timing.measure(roads, timing.Pace(rounds=2, seconds=0.0, budget=10.0), torch.device("cpu"))
    # A sample calls several times.
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    # First each road for its result; then a, b in one round and b, a in the next, with F between samples.
    assert "".join(turns) == "FaFb" + "FaFbF" + "bFaF"
    assert all(len(measurement.multiples) == 2 for measurement in found.values())


def test_times_are_of_one_vector_and_in_forward_passes():
    measurement = timing.Measurement(timing.Road("four at once", lambda: None, lambda: None, vectors=4))
    measurement.add(8.0, 0.5)
    measurement.add(4.0, 0.5)
    assert (measurement.time.median, measurement.in_forwards.median) == (1.5, 3.0)
    ratio = measurement.in_forwards.over(timing.Spread(2.0, 1.0, 4.0))
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 2.5 / 4, 3.5)


def test_turns_alternate():
    calls = []
    found = timing.in_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 3)
    assert "".join(calls) == "ab" + "ba" + "ab"
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert all(second >= 0 for second in timing.seconds_in_turns({"a": lambda: None}, 1)["a"])


def test_after_its_time_no_road_is_begun():
    called = []
    roads = [timing.Road(name, lambda name=name: called.append(name), lambda: None) for name in "ab"]
    pace = timing.Pace(rounds=2, seconds=0.0, budget=10.0, until=timing.clock() - 1)
    found = timing.measure(roads, pace, torch.device("cpu"))
    assert not called
    assert [measurement.failure for measurement in found.values()] == ["no time was left"] * 2


def test_a_road_begun_in_time_has_one_sample(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda: now[0])
    pace = timing.Pace(rounds=5, seconds=0.0, budget=10.0, until=0.5)

    def slow():
        now[0] = 1.0

    found = timing.measure([timing.Road("slow", slow, lambda: None)], pace, torch.device("cpu"))["slow"]
    assert len(found.multiples) == 1


def test_a_road_that_fails_is_said_to():
    def fails():
        raise RuntimeError("No kernel is available. Try another device.")

    found = timing.measure([timing.Road("bad", fails, lambda: None)], timing.PACES["smoke"], torch.device("cpu"))
    assert found["bad"].failure == "fails: No kernel is available"
    assert not found["bad"].multiples


def test_a_share_of_the_work_stands_for_all_of_it():
    measurement = timing.Measurement(timing.Road("three of twelve", lambda: None, lambda: None, vectors=3 / 12))
    measurement.add(2.0, 0.5)
    assert (measurement.time.median, measurement.in_forwards.median) == (8.0, 16.0)
