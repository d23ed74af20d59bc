import pytest

from lmc_curvature.cli import main


@pytest.fixture
def run(capsys):
    """Run the command line; returns exit status, standard output and standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run
