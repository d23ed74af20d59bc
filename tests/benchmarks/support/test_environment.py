import torch

from benchmarks.support import environment


def test_the_machine_and_the_commit_are_named():
    found = environment.environment(torch.device("cpu"))
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert found["threads"] >= 1
    assert found["commit"] is None or len(found["commit"]) == 7


def test_the_processor_is_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A processor\nmodel name\t: A processor\n")
    assert environment.processor_name(tmp_path / "cpuinfo") == "A processor"
    assert environment.processor_name(tmp_path / "missing")
