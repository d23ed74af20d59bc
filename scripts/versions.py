"""With which versions of Python and of other packages do the tests pass?

    python scripts/versions.py                            # every row, one after another
    python scripts/versions.py torch-2.11 --install       # make an environment, to test in later
    python scripts/versions.py --python ~/other/bin/python3.14

A row is an interpreter and constraints: this one with the newest versions, with the oldest torch and else the newest,
with the lowest of all, and each other Python with the newest. It gets a virtual environment with `.[dev]`, runs the
tests of `make test` there, and is removed. What came of a row stays in the folder, the tests' output beside it, and is
not done again: the same command continues. The table of all rows that are there is printed at the end. Status 1 says
that tests failed, or that a row has no result.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SHOWN = ("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib", "transformers")
COUNTS = ("passed", "failed", "skipped", "seconds")


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ROW]...", help="Rows; by default all.")] = None,
    python: Annotated[list[Path] | None, typer.Option(help="Another interpreter. Repeatable.")] = None,
    folder: Annotated[Path, typer.Option(help="Where environments and results lie.")] = ROOT / "runs" / "versions",
    processes: Annotated[str, typer.Option(help="Processes of tests, as pytest -n takes them.")] = "auto",
    install: Annotated[bool, typer.Option("--install", help="Make environments alone.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep environments, of several GiB each.")] = False,
) -> None:
    """Run the tests with several versions, and print a table."""
    rows = all_rows(python or [])
    if unknown := set(names or ()).difference(rows):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: expected rows of {', '.join(rows)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or rows:
        if not result_of(folder, name).exists() and make(folder / name, *rows[name]) and not install:
            run_tests(folder / name, result_of(folder, name), processes)
        if result_of(folder, name).exists() and not keep:
            shutil.rmtree(folder / name, ignore_errors=True)
    results = {
        name: json.loads(result_of(folder, name).read_text()) for name in rows if result_of(folder, name).exists()
    }
    print(table(results))
    asked = names or rows
    raise typer.Exit(int(not install and any(name not in results or results[name]["failed"] for name in asked)))


def all_rows(pythons: list[Path]) -> dict[str, tuple[Path, list[str]]]:
    """The interpreter and the constraints of each row, by its name."""
    script = [sys.executable, ROOT / "scripts" / "oldest_versions.py"]
    lowest = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    torch = [line for line in lowest if line.startswith("torch")]
    this = Path(sys.executable)
    rows = {"newest": (this, []), "torch-2.11": (this, torch), "lowest": (this, lowest)}
    on_path = [Path(found) for each in PYTHONS if (found := shutil.which(f"python{each}"))]
    for other in (*on_path, *pythons):
        ask = [other, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        # A shim may stand for a Python that is not there.
        if version := subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip():
            rows[f"python-{version}"] = (other, [])
    rows.pop("python-{}.{}".format(*sys.version_info), None)
    return rows


def result_of(folder: Path, name: str) -> Path:
    """The file of what came of a row."""
    return folder / f"{name}.json"


def make(environment: Path, python: Path, constraints: list[str]) -> bool:
    """Make a virtual environment with the project in it, unless it is there; return whether that went well."""
    if (environment / ".installed").exists():
        return True
    subprocess.run([python, "-m", "venv", "--clear", environment], check=True)
    (environment / "constraints.txt").write_text("\n".join(constraints))
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--constraint", environment / "constraints.txt", "--editable", ".[dev]"], cwd=ROOT, check=False
    )
    if done.returncode:
        print(f"{environment.name} could not be installed", file=sys.stderr)
        return False
    (environment / ".installed").touch()
    return True


def run_tests(environment: Path, result: Path, processes: str) -> None:
    """Run the tests in an environment, and write what they came to beside it."""
    python, report = environment / "bin" / "python", environment / "tests.xml"
    workers = ["-n", processes, "--dist", "worksteal"]
    began = time.monotonic()
    with result.with_suffix(".log").open("w") as log:
        tests = [python, "-m", "pytest", *workers, "-m", "not check", f"--junitxml={report}"]
        subprocess.run(tests, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    seconds = time.monotonic() - began
    if not report.exists():
        print(f"{environment.name}: the tests did not end; see {result.with_suffix('.log')}", file=sys.stderr)
        return
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        counts = {name: count + int(suite.get(name, 0)) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    record: dict[str, Any] = {
        "python": version,
        "packages": {each["name"]: each["version"] for each in json.loads(listed.stdout)},
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(seconds),
    }
    result.write_text(json.dumps(record, indent=1))


def table(results: dict[str, dict[str, Any]]) -> str:
    """What came of each row, in Markdown."""
    head = ("row", "Python", *SHOWN, *COUNTS)
    rows = [
        (
            name,
            found["python"],
            *(found["packages"].get(each, "–") for each in SHOWN),
            *(found[each] for each in COUNTS),
        )
        for name, found in results.items()
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    typer.run(main)
