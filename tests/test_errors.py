"""Claim: errors have one base class and the built-in class a caller expects, and hints name what would be right."""

import pytest

from lmc_curvature import LMCCurvatureError, errors
from lmc_curvature.errors import MemoryBudgetError, OptionError, check_choice, check_memory, counted, naming, suggest

_CLASSES = [kind for name, kind in vars(errors).items() if name.endswith("Error") and kind is not LMCCurvatureError]


@pytest.mark.parametrize("kind", _CLASSES)
def test_errors_derive_from_the_base_and_a_builtin(kind):
    assert issubclass(kind, LMCCurvatureError)
    assert issubclass(kind, (ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError))


@pytest.mark.parametrize(
    ("name", "choices", "hint"),
    [
        ("conv", ["fc", "conv1"], "did you mean 'conv1'?"),
        ("xyz", ["fc", "conv1"], "choose from 'fc', 'conv1'."),
        ("xyz", [str(number) for number in range(9)], "'6', '7', …."),
    ],
)
def test_hints(name, choices, hint):
    assert suggest(name, iter(choices)).endswith(hint)


def test_one_thing_is_not_several():
    numbers = {"layer": "layers", "entry": "entries", "batch": "batches", "class": "classes", "epoch": "epochs"}
    for one, several in numbers.items():
        assert (counted(1, one), counted(2, one), counted(0, one)) == (f"1 {one}", f"2 {several}", f"0 {several}")


def test_a_choice_outside_is_named_with_the_nearest():
    check_choice("batch_norm", "batch", iter(["batch", "interpolate"]))
    with pytest.raises(OptionError, match=r"^color='gren' is not a choice: did you mean 'green'\?$"):
        check_choice("color", "gren", iter(["red", "green"]))


def test_what_does_not_fit_is_named_with_its_size_and_a_remedy():
    check_memory(4.0, 4.0, "A matrix", "take half of it.")
    message = r"^A matrix takes 4\.01 GiB, more than memory_gib=4: take half of it\.$"
    with pytest.raises(MemoryBudgetError, match=message):
        check_memory(4.0101, 4.0, "A matrix", "take half of it.")


@pytest.mark.parametrize("kind", _CLASSES)
def test_what_an_error_is_about_is_said_first(kind):
    with pytest.raises(kind, match=r"^network 'c': it is bad$") as caught, naming("network 'c'"):
        raise kind("it is bad")
    assert isinstance(caught.value.__cause__, kind)
    with pytest.raises(kind, match="^it is bad$"), naming(""):
        raise kind("it is bad")
    with pytest.raises(ZeroDivisionError), naming("network 'c'"):
        raise ZeroDivisionError
