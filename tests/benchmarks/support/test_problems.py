import torch
import torch.nn.functional as F

from benchmarks.support.problems import Problem, digits_problem, image_problem, language_problem


def test_digits_are_learned():
    problem = digits_problem(32, width=2, epochs=1)
    assert problem.examples == 32
    assert not problem.model.training
    # That of a guess is log 10 = 2.3.
    assert problem.objective.loss() < 1.5


def _language():
    return language_problem(layers=1, width=4, heads=2, vocabulary=6, tokens=3, batch=2)


def test_peers_see_the_loss_of_a_language_model_as_a_cross_entropy():
    problem = _language()
    x, y = problem.for_peers.data
    loss = F.cross_entropy(problem.for_peers.model(x), y)
    torch.testing.assert_close(loss.item(), problem.objective.loss())
    assert problem.for_peers.examples == problem.examples
    found = torch.autograd.grad(loss, problem.for_peers.parameters)
    torch.testing.assert_close(found, problem.forward_backward())


def test_a_vector_holds_a_direction_in_the_order_of_the_parameters():
    problem = _language()
    vectors = [problem.vector(direction) for direction in problem.directions.values()]
    # Layers cover every parameter once, and nothing else moves.
    pairs = zip(problem.other.parameters(), problem.model.parameters(), strict=True)
    expected = torch.cat([(other - own).flatten() for other, own in pairs]).detach()
    torch.testing.assert_close(sum(vectors), expected)


def test_a_problem_for_another_process_is_the_same():
    problem = image_problem("resnet8", 3, width=2, pixels=8)
    other = Problem.unpacked(problem.packed(), "cpu")
    assert other.objective.loss() == problem.objective.loss()
    assert all(torch.equal(other.data[part], problem.data[part]) for part in (0, 1))
    assert all(torch.equal(tensor, other.state[name]) for name, tensor in problem.state.items())
