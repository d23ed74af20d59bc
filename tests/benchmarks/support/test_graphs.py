import pytest
import torch

from benchmarks.support.graphs import replayed
from benchmarks.support.problems import mlp_problem
from benchmarks.support.roads import eager_forward


def test_on_a_cpu_the_call_itself_is_the_unit():
    def run():
        return 1

    assert replayed(run, torch.device("cpu")) is run
    problem = mlp_problem(2, 3)
    assert eager_forward(problem) == []
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(1))
    problem.forward()
    problem.forward()
    assert len(calls) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_computes_from_what_is_there_now():
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    replay = replayed(lambda: y.copy_(2 * x), x.device)
    x.fill_(5)
    replay()
    assert y.tolist() == [10, 10, 10]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_unit_on_a_gpu_launches_nothing_from_python():
    problem = mlp_problem(2, 3, device="cuda")
    problem.forward()
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(1))
    problem.forward()
    assert not calls
    assert [road.name for road in eager_forward(problem)] == ["forward pass, eager"]
