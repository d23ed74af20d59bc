"""Try every network of the zoo, and write what came of it into docs/zoo.md.

    python scripts/zoo.py [--only PATTERN] [--again]

The networks are in tests/support/zoo. Rows are kept in docs/results/zoo/networks.csv as soon as they are computed: what
was interrupted goes on where it was. Nothing is downloaded.
"""

import re
from typing import Annotated

import torch
import typer
from tqdm.auto import tqdm

from tests.support.zoo import ZOO
from tests.support.zoo.rows import read_rows, row_of, write_rows


def main(
    only: Annotated[str, typer.Option(help="A regular expression that names of networks contain.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Compute rows anew that are there.")] = False,
) -> None:
    """Compute the missing rows, and write the table."""
    torch.set_num_threads(1)
    rows = {name: row for name, row in read_rows().items() if name in ZOO}
    missing = [name for name in ZOO if re.search(only, name) and (again or name not in rows)]
    with tqdm(missing) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            rows[name] = row_of(name)
            write_rows(rows)
    write_rows(rows)


if __name__ == "__main__":
    typer.run(main)
