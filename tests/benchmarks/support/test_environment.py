import subprocess

import pytest
import torch

from benchmarks.support import environment


def test_the_machine_and_the_commit_are_named():
    found = environment.environment(torch.device("cpu"))
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert found["threads"] >= 1


@pytest.fixture
def repository(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    name = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", "-C", tmp_path, *name, "commit", "-qm", "first", "--allow-empty"], check=True)
    return tmp_path


def test_a_tree_is_dirty_when_a_file_is_not_the_commits(repository):
    clean = environment.commit_of(repository)
    assert len(clean["commit"]) >= 7
    assert clean["dirty"] is False
    (repository / "new.py").write_text("")
    assert environment.commit_of(repository) == {"commit": clean["commit"], "dirty": True}


def test_a_folder_within_a_repository_has_no_commit_of_its_own(repository):
    (repository / "inside").mkdir()
    assert environment.commit_of(repository / "inside") == {"commit": None, "dirty": None}


def test_the_processor_is_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A processor\nmodel name\t: A processor\n")
    assert environment.processor_name(tmp_path / "cpuinfo") == "A processor"
    assert environment.processor_name(tmp_path / "missing")
