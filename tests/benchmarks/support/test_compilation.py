import pytest
import torch

from benchmarks.support import compilation
from benchmarks.support.problems import image_problem, language_problem, mlp_problem
from benchmarks.support.timing import Road
from lmc_curvature import HessianOperator


@pytest.mark.parametrize(
    "problem",
    [
        lambda: mlp_problem(3, 5).to(torch.float64),
        lambda: image_problem("resnet8", 3, width=2, pixels=8).to(torch.float64),
    ],
    ids=["perceptron", "residual"],
)
def test_its_product_is_the_hessians(problem):
    problem = problem()
    vector = torch.randn(problem.parameter_count, dtype=torch.float64)
    expected = problem.parameter_hessian @ vector
    torch.testing.assert_close(compilation.product_of(problem)(vector), expected, rtol=1e-9, atol=1e-11)


def test_its_product_in_the_parameters_of_a_layer():
    problem = mlp_problem(3, 5).to(torch.float64)
    layer, direction = next(iter(problem.directions.items()))
    expected = HessianOperator(problem.objective).block(layer).to_dense()
    product = compilation.product_of(problem, list(direction))
    found = torch.stack([product(unit) for unit in torch.eye(len(expected), dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_chunks_are_of_one_size(monkeypatch):
    seen = []

    def watch(product, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        return lambda rows: (seen.append(len(rows)), product(rows))[1]

    monkeypatch.setattr(torch, "compile", watch)
    monkeypatch.setattr(compilation, "columns_that_fit", lambda *args, **kwargs: 3)
    problem = mlp_problem(2, 4).to(torch.float64)
    rows = torch.randn(8, problem.parameter_count, dtype=torch.float64)
    at_once, compiled = compilation.compiled_in_chunks(problem, rows)
    found = compiled.run(rows)
    assert (at_once, set(seen)) == (3, {3})
    torch.testing.assert_close(found, (problem.parameter_hessian @ rows.T).T, rtol=1e-9, atol=1e-11)


def test_a_road_that_cannot_be_compiled_is_left_out_and_said():
    def fails():
        raise RuntimeError("no compiler\nwas found")

    makers = {"good": lambda: Road("good", int, int), "bad": fails}
    roads, notes = compilation.compiled_roads(makers, left_out=False)
    assert [road.name for road in roads] == ["good"]
    assert notes[-1] == "bad is missing, since it cannot be compiled: RuntimeError: no compiler"
    assert compilation.compiled_roads(makers, left_out=True) == ([], [compilation.LEFT_OUT])


@pytest.mark.check
def test_the_compiler_takes_it():
    problem = mlp_problem(2, 4)
    vector = torch.randn(problem.parameter_count)
    made, notes = compilation.compiled_roads(compilation.product_maker(problem, vector), left_out=False)
    if not made:
        pytest.skip(notes[-1])
    torch.testing.assert_close(made[0].run(), problem.parameter_hessian @ vector, rtol=1e-4, atol=1e-6)
    assert made[0].note.startswith("compiled in")


def test_a_language_models_product():
    problem = language_problem(layers=1, width=4, heads=2, vocabulary=6, tokens=3, batch=2).to(torch.float64)
    direction = next(iter(problem.directions.values()))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = compilation.product_of(problem)(problem.vector(direction))
    expected = problem.parameter_hessian @ problem.vector(direction)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
