"""Claim: whatever goes wrong in the midst of a command, no result is lost or wrong, and nothing unfinished is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"


def inject(out, *options):
    """Run the script, which forks: not from here, where there are threads."""
    command = [sys.executable, SCRIPT, "--no-page", "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_faults_in_a_short_command_lose_nothing(tmp_path):
    printed, results = inject(tmp_path / "faults.jsonl", "--only", "[!s]*/merge/*", "--most", "3")
    assert len(results) == 3
    assert not any(result["violations"] for result in results)
    assert "| all | 3 |" in printed


@pytest.mark.check
def test_faults_of_every_kind_lose_nothing_and_are_injected_once(tmp_path):
    options = ("--most", "12", "--seed", "1")
    printed, results = inject(tmp_path / "faults.jsonl", *options)
    assert len(results) == 12
    assert len({result["kind"] for result in results}) > 11
    again, same = inject(tmp_path / "faults.jsonl", *options)
    assert same == results
    assert again.splitlines()[-1] == printed.splitlines()[-1]
