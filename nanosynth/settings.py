"""Settings: defaults < config file < --key=value, under one check. The only reader of argv.

A script declares a frozen, keyword-only dataclass whose fields are made by `setting`, and calls
`from_argv` before it imports torch, so that a typo is said at once. A config file is plain Python
assignments; names with a leading underscore are its own helpers.
"""

import ast
import contextlib
import dataclasses
import difflib
import os
import runpy
import shlex
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from nanosynth import UserError

MANY = tuple[str, ...]  # the type of a setting whose flag may be given several times


def setting(default: object, help: str) -> typing.Any:
    """One field of a settings dataclass: its default and the line that --help prints."""
    return dataclasses.field(default=default, metadata={"help": help})


def from_argv(cls: type, *, config_file: bool = False) -> tuple:
    """(settings, origins) of the command line; a UserError ends the program with one line."""
    with one_line_errors():
        return load(cls, sys.argv[1:], _script(), config_file=config_file)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A UserError is printed as one line, exit 1; Ctrl-C is silent, exit 130."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{_script()}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _script() -> str:
    return os.path.basename(sys.argv[0])


def command_line() -> str:
    """The script and its arguments as they were given, quoted for a shell."""
    return shlex.join([_script(), *sys.argv[1:]])


def load(cls: type, argv: list[str], script: str, *, config_file: bool = False) -> tuple:
    """(settings, origins): an instance of `cls`, and where each of its values came from."""
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, script, config_file=config_file))
        sys.exit(0)
    paths = [argument for argument in argv if not argument.startswith("-")]
    if len(paths) > (1 if config_file else 0):
        wanted = "one config file, then flags" if config_file else "flags only"
        raise UserError(f"unexpected argument {paths[-1]!r}; wanted {wanted} (--key=value)")
    field_types = typing.get_type_hints(cls)
    values: dict[str, object] = {}
    origins = dict.fromkeys(field_types, "default")
    for path in paths:
        for name, value in read_config(path).items():
            values[name] = check(name, value, field_types, path)
            origins[name] = path
    for flag in (argument for argument in argv if argument.startswith("-")):
        name, equals, text = flag.removeprefix("--").partition("=")
        if not equals and name in field_types and bool in _members(field_types[name]):
            equals, text = "=", "True"
        if not equals or not flag.startswith("--"):
            raise UserError(f"cannot read {flag!r}; flags are written --key=value, see --help")
        if field_types.get(name) == MANY:
            earlier = values[name] if origins[name] == "command line" else ()
            values[name] = (*earlier, text)
        else:
            values[name] = check(name, text, field_types, "the command line", parse=True)
        origins[name] = "command line"
    return cls(**values), origins


def read_config(path: str) -> dict[str, object]:
    """The assignments of a config file, without its helpers."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}; the shipped ones are in config/")
    try:
        namespace = runpy.run_path(path)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return {name: value for name, value in namespace.items() if not name.startswith("_")}


def check(name: str, value: object, field_types: dict, origin: str, *, parse: bool = False):
    """`value` as the type of field `name`; with `parse` it is the text of a flag."""
    if name not in field_types:
        near = difflib.get_close_matches(name, field_types, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see --help"
        raise UserError(f"unknown setting {name!r} in {origin}; {hint}")
    wanted = field_types[name]
    if parse and str not in _members(wanted):
        value = _parse(value, wanted)
    for member in _members(wanted):
        if typing.get_origin(member) is typing.Literal:
            if value in typing.get_args(member) and isinstance(value, str):
                return value
        elif member == MANY:
            if isinstance(value, tuple) and all(isinstance(part, str) for part in value):
                return value
        elif member is float and type(value) is int:
            return float(value)
        elif type(value) is member:
            return value
    raise UserError(f"{name} in {origin}: wanted {type_name(wanted)}, got {value!r}")


def _members(wanted: object) -> tuple:
    is_union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return typing.get_args(wanted) if is_union else (wanted,)


def _parse(text: str, wanted: object) -> object:
    """A flag's text as a Python literal; true, false and none in any case; else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def type_name(wanted: object) -> str:
    """How a field's type is written in --help and in errors: 'int', 'auto|float16', ..."""
    names = []
    for member in _members(wanted):
        if typing.get_origin(member) is typing.Literal:
            names += typing.get_args(member)
        elif member == MANY:
            names.append("str ...")
        else:
            names.append("None" if member is type(None) else member.__name__)
    return "|".join(names)


def help_text(cls: type, script: str, *, config_file: bool) -> str:
    """The --help table: every setting with its type, default, unit and reason."""
    usage = f"usage: python {script} {'[config/NAME.py] ' if config_file else ''}[--key=value ...]"
    field_types = typing.get_type_hints(cls)
    rows = [
        (f"--{f.name}", type_name(field_types[f.name]), repr(f.default), f.metadata["help"])
        for f in dataclasses.fields(cls)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    return "\n".join([(cls.__doc__ or "").strip(), "", usage, "", *lines])


def describe(settings: object, origins: dict[str, str]) -> str:
    """Every value with its origin, one a line."""
    values = dataclasses.asdict(settings)
    width = max(map(len, values))
    return "\n".join(
        f"  {name:<{width}} = {value!r}  ({origins[name]})" for name, value in values.items()
    )
