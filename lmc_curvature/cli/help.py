"""The help of the commands: options in sections, each with a word that says what it takes."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

ARGUMENTS, OWN = "Arguments", "Options"
NETWORKS, DATA, LAYERS, COMPUTATION, OUTPUT = "Networks", "Data", "Layers", "Computation", "Output"
_SECTIONS = (ARGUMENTS, OWN, NETWORKS, DATA, LAYERS, COMPUTATION, OUTPUT)


class PlainCommand(TyperCommand):
    """A command whose help has its options in sections, and names no types of Python."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What the command needs, and that it has options."""
        needed = [param for param in self.get_params(ctx) if param.required]
        return [" ".join(_names(param)) for param in needed] + ["[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections."""
        _write_sections(self.get_params(ctx), ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The whole first sentence, in the list of commands."""
        return (self.help or "").partition("\n")[0]


class PlainGroup(TyperGroup):
    """The group of commands, whose help is as theirs."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options and the commands."""
        _write_sections(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)


def _write_sections(params: list[Any], ctx: Any, formatter: Any) -> None:
    rows: dict[str, list[tuple[str, str]]] = {section: [] for section in _SECTIONS}
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            is_argument = param.param_type_name == "argument"
            section = ARGUMENTS if is_argument else getattr(param, "rich_help_panel", None) or OWN
            rows[section].append((" ".join(_names(param)), record[1].replace("x>=", "at least ")))
    for section, found in rows.items():
        if found:
            with formatter.section(section):
                formatter.write_dl(found)


def _names(param: Any) -> list[str]:
    """What an argument is called, or an option and what it takes."""
    takes = param.metavar or param.name.upper()
    if param.param_type_name == "argument":
        return [takes]
    # The long name last, as -h, --help; and of two the one that switches on first.
    names = ", ".join(sorted(param.opts, key=len)) + "".join(f" / {name}" for name in param.secondary_opts)
    return [names] if param.is_flag else [names, takes]
