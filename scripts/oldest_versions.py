"""Print the lowest versions that pyproject.toml allows of what users install, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
requirements = [*project["dependencies"], *(each for name in extras if name != "dev" for each in extras[name])]
for requirement in requirements:
    print(re.sub(r"(\[.*\])?>=", "==", requirement))
