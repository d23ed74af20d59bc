"""`python -m lmc_curvature`: the command line."""

from lmc_curvature.cli import main

main()
