"""`python -m lmc_curvature.cli`: the command line, as `torchrun -m` starts it on every rank."""

from lmc_curvature.cli import main

main()
