"""One HTML file that says what was found, opens anywhere without a network, and computes any set of layers itself."""

from lmc_curvature.report.contents import Contents, Pair
from lmc_curvature.report.page import write_page, write_report
from lmc_curvature.report.reading import read_contents

__all__ = ["Contents", "Pair", "read_contents", "write_page", "write_report"]
