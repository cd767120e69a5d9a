"""Settings: defaults < config file < flags, under one check. The only reader of argv.

A script declares a frozen, keyword-only dataclass on `Settings` whose fields are made by `setting`,
and calls `from_argv` before it imports torch, so that a typo is said at once. Written by hand where
libraries exist, because none of them has all of: checked config files that are plain Python, the
origin of each value, the nearest name to a typo, and bounds that name their flag.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import operator
import os
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanosynth import UserError, terminal

DTYPE = typing.Literal["auto", "float16", "bfloat16", "float32"]
MANY = tuple[str, ...]  # the type of a setting whose flag may be given several times
HELP_COLUMNS = 100
LARGEST_INT = 2**63 - 1  # of what counts in torch and numpy
SEED = {"at_least": 0, "at_most": 2**32 - 1}  # every generator that is seeded takes it
# A bound's test and its words, in the order of --help and errors.
BOUNDS = {
    "at_least": (operator.ge, "{:,} or more"),
    "above": (operator.gt, "above {:,}"),
    "at_most": (operator.le, "at most {:,}"),
    "below": (operator.lt, "below {:,}"),
}


def setting(
    default: object,
    help: str,
    *,
    group: str = "",
    path: bool = False,
    instead_of: str = "",
    **bounds: float,
) -> typing.Any:
    """One field of a settings dataclass: its default, the line that --help prints, its bounds.

    `group` begins a group of --help. A `path` has its ~ expanded, and is not empty unless its
    default is. The bounds, of those in BOUNDS, hold for the numbers among a setting's values.
    `instead_of` names a setting that this one is another way to say: a flag of either replaces both
    of a config file.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"help": help, "group": group, "path": path, "instead_of": instead_of}
    return dataclasses.field(default=default, metadata={**metadata, "bounds": bounds})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all settings share: bounds are checked when an instance is made, by whomever."""

    origins: typing.ClassVar[Mapping[str, str]] = {}  # where each value came from; set by `load`

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            bounds = field.metadata["bounds"]
            if type(value) is int and value > LARGEST_INT:
                bounds = {"at_most": LARGEST_INT} | bounds
            if type(value) in (int, float):
                is_finite = abs(value) < math.inf  # nor is NaN
                is_within = (BOUNDS[name][0](value, bound) for name, bound in bounds.items())
                if not (is_finite and all(is_within)):
                    wanted = ["" if is_finite else "a finite number", bounds_text(bounds)]
                    self.refuse(field.name, f"wanted {', '.join(filter(None, wanted))}")
            # all: of a setting that may be given several times, none is empty
            if field.metadata["path"] and default and not (value and all(value)):
                self.refuse(field.name, "wanted a path")
        self.check()

    def check(self) -> None:
        """Rules between settings; raises by `refuse`."""

    def refuse(self, name: str, why: str) -> typing.NoReturn:
        """Raise the UserError that names the flag, its value and what is wanted."""
        raise UserError(f"--{name}={getattr(self, name)}; {why}")


def bounds_text(bounds: Mapping[str, float]) -> str:
    """How bounds are written in --help and in errors.

    >>> bounds_text({"at_least": 0, "below": 1})
    '0 or more, below 1'
    """
    said = (text.format(bounds[name]) for name, (_, text) in BOUNDS.items() if name in bounds)
    return ", ".join(said)


def from_argv(cls: type, *, config_file: bool = False) -> typing.Any:
    """The settings of the command line; a UserError ends the program with one line."""
    with one_line_errors():
        return load(cls, sys.argv[1:], program(), config_file=config_file)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend is printed as one line, exit 1: a UserError, a file that can't be used,
    memory that is not there. Ctrl-C, and a reader that has gone, are silent.
    """
    terminal.prepare_streams()
    code, why = 0, None
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141  # a shell's word for SIGPIPE
    except (UserError, OSError) as error:
        code, why = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = terminal.one_line(str(error).partition(". ")[0])
        code, why = 1, f"out of memory: {reason}; take less at once, or a smaller model"
    finally:
        terminal.drop_unprinted()
    if why is not None:
        said = f"{program().removeprefix('-m ')}: error: {why}"
        terminal.say(terminal.one_line(said), to_stderr=True)
    if code:
        sys.exit(code)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it tells of memory that is not there: Python's, numpy's, or torch's on any device."""
    said = re.search("out of memory|not enough memory|allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(said)


def program() -> str:
    """What follows `python` to run this program: 'train.py' or '-m verdict'."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None of a script, not of a module
    if spec:
        return f"-m {spec.name.removesuffix('.__main__')}"
    script = Path(sys.argv[0])
    return script.name if script.is_absolute() else str(script)


def command_line() -> str:
    """The program and its arguments as they were given, quoted for a shell."""
    return shlex.join([*program().split(), *sys.argv[1:]])


def load(cls: type, argv: list[str], program: str, *, config_file: bool = False) -> typing.Any:
    """An instance of `cls` from a command line, with the `origins` of its values."""
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, program, config_file=config_file))
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    paths, flags = _split(argv, fields)
    if len(paths) > (1 if config_file else 0):
        wanted = "one config file, then flags" if config_file else "flags only"
        raise UserError(f"unexpected argument {paths[-1]!r}; wanted {wanted} (--key=value)")
    values: dict[str, object] = {}
    origins = dict.fromkeys(fields, "default")
    for path in paths:
        for name, value in read_config(path).items():
            values[name] = checked(fields, name, value, path)
            origins[name] = path
    for field in fields.values():
        either = {field.name, field.metadata["instead_of"]}
        if field.metadata["instead_of"] and either & {name for name, _ in flags}:
            values = {name: value for name, value in values.items() if name not in either}
    for name, text in flags:
        value = checked(fields, name, text, "the command line", parse=True)
        if fields[name].type == MANY and origins[name] == "command line":
            value = (*values[name], *value)
        values[name] = value
        origins[name] = "command line"
    settings = cls(**values)
    object.__setattr__(settings, "origins", origins)
    return settings


def _split(argv: list[str], fields: dict) -> tuple[list[str], list[tuple[str, str]]]:
    """(other arguments, flags as (name, text)): --key=value, --key value, and --key of a bool."""
    paths, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            paths.append(argument)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UserError(f"cannot read {argument!r}; flags are written --key=value, see --help")
        if not equals and name in fields:
            choices = _choices(fields[name].type)
            follows = bool(rest) and not rest[0].startswith("--")
            if bool in choices and not (follows and rest[0].lower() in {"true", "false", *choices}):
                text = "True"
            elif follows:
                text = rest.pop(0)
            else:
                raise UserError(f"--{name} wants a value, written --{name}=value, see --help")
        flags.append((name, text))
    return paths, flags


def read_config(path: str) -> dict[str, object]:
    """The assignments of a config file, without its helpers: _names and imported modules."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}; the shipped ones are in config/")
    try:
        for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
            text = isinstance(node, ast.Expr) and not isinstance(
                node.value, ast.Constant | ast.Call
            )
            if text or (isinstance(node, ast.AnnAssign) and node.value is None):
                raise UserError(f"{path}, line {node.lineno}: wanted assignments, as n_layer = 24")
        namespace = runpy.run_path(path)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    values = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    if not values:
        raise UserError(f"{path} sets nothing; wanted assignments, as n_layer = 24")
    return values


def checked(fields: dict, name: str, value: object, origin: str, *, parse: bool = False) -> object:
    """`value` as the type of the field `name`; with `parse` it is the text of a flag."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see --help"
        if not parse:
            hint += " (the name of a helper begins with _)"
        raise UserError(f"unknown setting {name!r} in {origin}; {hint}")
    wanted, metadata = fields[name].type, fields[name].metadata
    expand = os.path.expanduser if metadata["path"] else str
    if wanted == MANY:
        parts = (value,) if isinstance(value, str) else value
        if isinstance(parts, tuple | list) and all(isinstance(part, str) for part in parts):
            return tuple(map(expand, parts))
    elif parse and str not in _choices(wanted):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            # A Python literal; true and false in any case.
            is_bool = value.lower() in ("true", "false")
            value = ast.literal_eval(value.capitalize() if is_bool else value)
    for choice in _choices(wanted):
        if choice is float and type(value) is int and abs(value) <= LARGEST_INT:
            return float(value)
        if type(value) is choice:
            return expand(value) if choice is str else value
        if isinstance(value, str) and value == choice:
            return value
    bounds = metadata["bounds"]
    also = f", {bounds_text(bounds)}" if bounds else ""
    raise UserError(f"{name} in {origin}: wanted {type_name(wanted)}{also}, got {value!r}")


def _choices(wanted: object) -> tuple:
    """The types and the words that a field's type is a choice of.

    >>> _choices(int | typing.Literal["auto"])
    (<class 'int'>, 'auto')
    """
    is_choice = typing.get_origin(wanted) in (types.UnionType, typing.Union, typing.Literal)
    return sum(map(_choices, typing.get_args(wanted)), ()) if is_choice else (wanted,)


def type_name(wanted: object) -> str:
    """How a field's type is written in --help and in errors: 'int', 'auto|float16', ..."""
    if wanted == MANY:
        return "str, several times"
    return "|".join(getattr(one, "__name__", one) for one in _choices(wanted) if one)


def help_text(cls: type, program: str, *, config_file: bool) -> str:
    """What --help prints: every setting in its group with its default, reason, type and bounds."""
    columns = min(HELP_COLUMNS, shutil.get_terminal_size((HELP_COLUMNS, 24)).columns)
    usage = f"usage: python {program} {'[config/NAME.py] ' if config_file else ''}[--key=value ...]"
    fields = dataclasses.fields(cls)
    flags = {f.name: f"  --{f.name}={_shown(f.default)}" for f in fields}
    indent = 2 + min(34, max(map(len, flags.values())))
    lines = [*textwrap.wrap(" ".join((cls.__doc__ or "").split()), columns), "", usage]
    for field in fields:
        bounds = field.metadata["bounds"]
        facts = [type_name(field.type)] + ([bounds_text(bounds)] if bounds else [])
        text = f"{field.metadata['help']} ({', '.join(facts)})"
        if field.metadata["group"]:
            lines += ["", field.metadata["group"]]
        flag = flags[field.name]
        if len(flag) + 2 > indent:
            lines.append(flag)
            flag = ""
        lines += textwrap.wrap(
            text,
            columns,
            initial_indent=flag.ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def describe(settings: Settings) -> str:
    """The values that differ from the defaults, each with its origin, one a line."""
    values = {field: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changed = {field.name: value for field, value in values.items() if value != field.default}
    width = max(map(len, changed), default=0)
    return "\n".join(
        f"  {name:<{width}} = {value!r}  ({settings.origins.get(name, 'set by the program')})"
        for name, value in changed.items()
    )
