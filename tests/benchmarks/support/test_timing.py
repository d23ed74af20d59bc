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
