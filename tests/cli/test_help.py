"""Claim: help is plain, told by -h of every command, and shells complete commands and options."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from lmc_curvature.cli.app import app
from lmc_curvature.cli.help import PlainCommand

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_plain(command, run):
    command = [] if command is None else [command]
    status, out, err = run(*command, "-h")
    assert (status, err) == (0, "")
    assert run(*command, "--help") == (0, out, "")
    assert out.startswith(f"Usage: {' '.join(['lmc-curvature', *command])} ")
    # No types of Python, and nothing that is cut short.
    assert not re.search(r"[<>{]|\.\.\.\n|list\[|_", out.replace("[ARGS]...", "").replace("num_classes", "")
                         .replace("state_dict", "").replace("config.json", "")), out  # fmt: skip
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_and_says_what_it_takes(command, run):
    assert isinstance(COMMANDS[command], PlainCommand)
    text = run(command, "-h")[1]
    for param in COMMANDS[command].params:
        assert param.help.endswith((".", "…")), param.name
        name = param.metavar if param.param_type_name == "argument" else param.opts[0]
        row = rf"^  {re.escape(name)}(, --\w+)?" + (
            ""
            if param.param_type_name == "argument"
            else " / --no-"
            if param.secondary_opts
            else r"\b"
            if param.is_flag
            else f" {re.escape(param.metavar)}"
        )
        assert len(re.findall(row, text, re.MULTILINE)) == 1, param.name  # fmt: skip


def test_usage_names_what_is_needed(run):
    assert "Usage: lmc-curvature predict A B --model MODEL --data DATA [OPTIONS]\n" in run("predict", "-h")[1]
    assert "Usage: lmc-curvature merge A B --out FILE [OPTIONS]\n" in run("merge", "-h")[1]


def _shell(words, **environment):
    """What the completion of bash gets for a line."""
    environment |= {"_LMC_CURVATURE_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run(
        [sys.executable, "-m", "lmc_curvature"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.check
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lmc-curvature me", ["measure", "merge"]),
        ("lmc-curvature predict --batch-", ["--batch-norm", "--batch-size"]),
        ("lmc-curvature predict --batch-norm re", ["recalibrate"]),
    ],
)
def test_shells_complete(words, expected):
    assert sorted(_shell(words)) == expected


def test_the_script_of_a_shell_is_shown():
    line = f"{sys.executable} -m lmc_curvature --show-completion; true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "_LMC_CURVATURE_COMPLETE=complete_bash" in done.stdout
    assert "lmc-curvature" in done.stdout.splitlines()[-1]
