"""A user's file of options: TOML with one key per option. A command's table overrides the keys common to all commands.

Pure but for `read`. The command line defines what the values mean; this module selects those for one command.
"""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from vllm_specedge.errors import UserError

SECRETS = {"token": "token_file", "api_key": "api_key_file"}
"""Keys that are refused, with the option to use instead: the file names files with secrets, it holds none itself."""


def folder(platform: str, environment: Mapping[str, str], home: Path) -> Path:
    """The folder of a user's file of options, by `sys.platform`. macOS uses the same as Linux, as most tools do."""
    if platform == "win32":
        return Path(environment.get("APPDATA") or home / "AppData" / "Roaming") / "specedge"
    return Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "specedge"


def read(file: Path) -> dict[str, Any]:
    """The values in a file of options. Raises UserError if it cannot be read or is not valid TOML."""
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise UserError(f"The configuration {file} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration {file} is not valid TOML ({error!s:.100}): correct that line.") from None


def options_of(
    command: str, values: Mapping[str, Any], names: Mapping[str, Collection[str]], file: Path
) -> dict[str, Any]:
    """The values for `command`, by the options' names with underscores.

    `names` has every command's options. A key outside of a table is for every command that has this option. Raises
    UserError for a key that no command has, or that the table's command does not have.
    """
    common = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for table in tables:
        if table not in names:
            raise UserError(f"In {file}, there is no command [{table}]: tables are {', '.join(names)}.")
    everywhere = set().union(*names.values())
    chosen = _named(common, everywhere, "", file)
    for table, content in tables.items():
        named = _named(content, names[table], table, file)
        chosen |= named if table == command else {}
    return {
        name: str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value
        for name, value in chosen.items()
        if name in names[command]
    }


def _named(values: Mapping[str, Any], known: Collection[str], table: str, file: Path) -> dict[str, Any]:
    named = {key.replace("-", "_"): value for key, value in values.items()}
    where = f"{file}, [{table}]" if table else f"{file}"
    for name in named:
        if name in SECRETS:
            raise UserError(
                f"In {where}, {name} would be a secret in the clear: put it into its own file, and set "
                f"{SECRETS[name]} to that file."
            )
        if name not in known:
            raise UserError(f"In {where}, there is no option {name}: see edge-client {table or 'COMMAND'} --help.")
    return named


MEANT: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}
"""Names of the types in messages. All other types are texts."""


class Kind(NamedTuple):
    """The type and range that an option accepts."""

    type: type
    is_list: bool = False
    low: float | None = None
    high: float | None = None

    def check(self, name: str, value: Any, file: Path) -> None:
        """Raises UserError for a value of another type or out of range."""
        meant = MEANT.get(self.type, "a text in quotes")
        accepted = {float: (int, float), int: (int,), bool: (bool,)}.get(self.type, (str,))
        values = value if self.is_list and isinstance(value, list) else [value]
        is_right = isinstance(value, list) == self.is_list and all(
            isinstance(each, accepted) and isinstance(each, bool) == (self.type is bool) for each in values
        )
        if not is_right:
            what = f"a list, each {meant}" if self.is_list else meant
            raise UserError(f"In {file}, {name} is {value!r:.40}: it takes {what}.")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            bounds = f"from {self.low:g} on" if self.high is None else f"from {self.low:g} to {self.high:g}"
            raise UserError(f"In {file}, {name} is {value}: it takes {meant} {bounds}.")


def kind_of(annotation: Any) -> Kind:
    """The kind of a command's parameter, from its typer annotation."""
    type_, *described = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    bounds = [(getattr(each, "min", None), getattr(each, "max", None)) for each in described]
    is_union = get_origin(type_) in (Union, UnionType)
    base = next(each for each in get_args(type_) if each is not NoneType) if is_union else type_
    is_list = get_origin(base) is list
    return Kind(get_args(base)[0] if is_list else base, is_list, *(bounds[0] if bounds else ()))
