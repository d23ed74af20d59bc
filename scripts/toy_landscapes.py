"""Draw the toy landscapes and the kinds of barrier curve (Singh et al. 2024, Figures 6 and 7).

python scripts/toy_landscapes.py [--out runs/figures]
"""

import argparse
from pathlib import Path

from lmc_curvature.figures import draw_barrier_kinds, draw_toy_landscapes, save_figure


def main() -> None:
    """Parse, draw and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/figures"))
    out = parser.parse_args().out
    for name, figure in {"toy-landscapes": draw_toy_landscapes(), "barrier-kinds": draw_barrier_kinds()}.items():
        for path in save_figure(figure, out / name):
            print(path)


if __name__ == "__main__":
    main()
