"""The common base of configurations: frozen, strict about keys, with errors that name the key."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lmc_curvature.errors import ConfigurationError, suggest


def describe_problems(error: ValidationError, keys: Iterable[str]) -> str:
    """Return one line `key: problem` for each problem, dots leading into nested configurations.

    Args:
        error: What pydantic found.
        keys: The keys that would have been right, to suggest one for a misspelt key.
    """
    keys = list(keys)
    lines: list[str] = []
    for item in error.errors(include_url=False):
        location = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigurationError):
            lines += [f"{location}.{line}" for line in str(cause).splitlines()]
        elif item["type"] == "extra_forbidden":
            lines.append(f"{location}: unknown key; {suggest(location, keys)}")
        elif item["type"] == "missing":
            lines.append(f"{location}: missing; a value is required.")
        elif cause is not None:
            lines.append(f"{location}: {cause}")
        else:
            lines.append(f"{location}: {item['msg']}, got {item['input']!r}.")
    return "\n".join(lines)


class Configuration(BaseModel):
    """A frozen set of named options.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value. The message has a line for each.
    """

    # pydantic before 2.10 reserves every name that begins with "model_".
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(describe_problems(error, type(self).model_fields)) from error
