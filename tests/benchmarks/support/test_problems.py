from benchmarks.support.problems import digits_problem


def test_digits_are_learned():
    problem = digits_problem(32, width=2, epochs=1)
    assert problem.examples == 32
    assert not problem.model.training
    # That of a guess is log 10 = 2.3.
    assert problem.objective.loss() < 1.5
