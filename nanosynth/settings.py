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

MANY = tuple[str, ...]  # the type of a setting whose flag may be given several times
HELP_COLUMNS = 100
LARGEST_INT = 2**63 - 1  # of what counts in torch and numpy
LARGEST_SEED = 2**32 - 1  # every generator that is seeded takes it


def setting(
    default: object,
    help: str,
    *,
    group: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
    instead_of: str = "",
) -> typing.Any:
    """One field of a settings dataclass: its default, the line that --help prints, its bounds.

    `group` begins a group of --help. A `path` has its ~ expanded, and is not empty unless its
    default is. The bounds hold for the numbers among a setting's values. `instead_of` names a
    setting that this one is another way to say: a flag of either replaces both of a config file.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "group": group, "bounds": bounds, "path": path}
    metadata["instead_of"] = instead_of
    return dataclasses.field(default=default, metadata=metadata)


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
            if type(value) in (int, float) and not _is_within(value, bounds):
                is_finite = type(value) is int or math.isfinite(value)
                wanted = ([] if is_finite else ["a finite number"]) + [bounds_text(bounds)]
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


def _is_within(value: float, bounds: Mapping[str, float]) -> bool:
    return (
        value == value
        and abs(value) != math.inf
        and value >= bounds.get("at_least", -math.inf)
        and value <= bounds.get("at_most", math.inf)
        and ("above" not in bounds or value > bounds["above"])
        and ("below" not in bounds or value < bounds["below"])
    )


def bounds_text(bounds: Mapping[str, float]) -> str:
    """How bounds are written in --help and in errors.

    >>> bounds_text({"at_least": 0, "below": 1})
    '0 or more, below 1'
    """
    words = {"at_least": "{:,} or more", "above": "above {:,}"}
    words |= {"at_most": "at most {:,}", "below": "below {:,}"}
    said = [text.format(bounds[name]) for name, text in words.items() if name in bounds]
    return ", ".join(said)


def from_argv(cls: type, *, config_file: bool = False) -> typing.Any:
    """The settings of the command line; a UserError ends the program with one line.

    From then on Ctrl-C is silent, also while a script imports torch.
    """
    sys.excepthook = terminal.except_interrupts
    with one_line_errors():
        return load(cls, sys.argv[1:], program(), config_file=config_file)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend is printed as one line, exit 1: a UserError, a file that can't be used,
    memory that is not there. Ctrl-C, and a reader that has gone, are silent.
    """
    terminal.prepare_streams()
    name = program().removeprefix("-m ")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        code = f"{name}: error: {error}"
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141  # a shell's word for SIGPIPE
    except OSError as error:
        code = f"{name}: error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = terminal.one_line(str(error).partition(". ")[0])
        code = f"{name}: error: out of memory: {reason}; take less at once, or a smaller model"
    else:
        code = 0
    finally:
        terminal.drop_unprinted()
    if isinstance(code, str):
        terminal.say(terminal.one_line(code), to_stderr=True)
        code = 1
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
    field_types = _field_types(cls)
    paths, flags = _split(argv, field_types)
    if len(paths) > (1 if config_file else 0):
        wanted = "one config file, then flags" if config_file else "flags only"
        raise UserError(f"unexpected argument {paths[-1]!r}; wanted {wanted} (--key=value)")
    values: dict[str, object] = {}
    origins = dict.fromkeys(field_types, "default")
    for path in paths:
        for name, value in read_config(path).items():
            values[name] = checked(cls, name, value, path)
            origins[name] = path
    for field in dataclasses.fields(cls):
        either = {field.name, field.metadata["instead_of"]}
        if field.metadata["instead_of"] and either & {name for name, _ in flags}:
            values = {name: value for name, value in values.items() if name not in either}
    for name, text in flags:
        value = checked(cls, name, text, "the command line", parse=True)
        if field_types[name] == MANY and origins[name] == "command line":
            value = (*values[name], *value)
        values[name] = value
        origins[name] = "command line"
    settings = cls(**values)
    object.__setattr__(settings, "origins", origins)
    return settings


def _field_types(cls: type) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _split(argv: list[str], field_types: dict) -> tuple[list[str], list[tuple[str, str]]]:
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
        if not equals and name in field_types:
            members = _members(field_types[name])
            words = {"true", "false", *(w for m in members for w in typing.get_args(m))}
            follows = bool(rest) and not rest[0].startswith("--")
            if bool in members and not (follows and rest[0].lower() in words):
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


def checked(cls: type, name: str, value: object, origin: str, *, parse: bool = False) -> object:
    """`value` as the type of `cls`'s field `name`; with `parse` it is the text of a flag."""
    field_types = _field_types(cls)
    if name not in field_types:
        near = difflib.get_close_matches(name, field_types, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see --help"
        if not parse:
            hint += " (the name of a helper begins with _)"
        raise UserError(f"unknown setting {name!r} in {origin}; {hint}")
    wanted = field_types[name]
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if parse and wanted == MANY:
        value = (value,)
    elif parse and str not in _members(wanted):
        value = _parse(value)
    for member in _members(wanted):
        if typing.get_origin(member) is typing.Literal:
            if value in typing.get_args(member) and isinstance(value, str):
                return value
        elif member == MANY:
            parts = (value,) if isinstance(value, str) else value
            if isinstance(parts, tuple | list) and all(isinstance(part, str) for part in parts):
                expand = os.path.expanduser if field.metadata["path"] else str
                return tuple(map(expand, parts))
        elif member is float and type(value) is int and abs(value) <= LARGEST_INT:
            return float(value)
        elif type(value) is member:
            return os.path.expanduser(value) if field.metadata["path"] else value
    bounds = field.metadata["bounds"]
    also = f", {bounds_text(bounds)}" if bounds else ""
    raise UserError(f"{name} in {origin}: wanted {type_name(wanted)}{also}, got {value!r}")


def _members(wanted: object) -> tuple:
    is_union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return typing.get_args(wanted) if is_union else (wanted,)


def _parse(text: str) -> object:
    """A flag's text as a Python literal; true, false and none in any case; else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def type_name(wanted: object) -> str:
    """How a field's type is written in --help and in errors: 'int', 'auto|float16', ..."""
    names = []
    for member in _members(wanted):
        if typing.get_origin(member) is typing.Literal:
            names += filter(None, typing.get_args(member))
        elif member == MANY:
            names.append("str, several times")
        else:
            names.append("None" if member is type(None) else member.__name__)
    return "|".join(names)


def help_text(cls: type, program: str, *, config_file: bool) -> str:
    """What --help prints: every setting in its group with its default, reason, type and bounds."""
    columns = min(HELP_COLUMNS, shutil.get_terminal_size((HELP_COLUMNS, 24)).columns)
    usage = f"usage: python {program} {'[config/NAME.py] ' if config_file else ''}[--key=value ...]"
    fields, field_types = dataclasses.fields(cls), _field_types(cls)
    flags = {f.name: f"  --{f.name}={_shown(f.default)}" for f in fields}
    indent = 2 + min(34, max(map(len, flags.values())))
    lines = [*textwrap.wrap(" ".join((cls.__doc__ or "").split()), columns), "", usage]
    for field in fields:
        bounds = field.metadata["bounds"]
        facts = [type_name(field_types[field.name])] + ([bounds_text(bounds)] if bounds else [])
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
    changed = [
        (field.name, getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    width = max((len(name) for name, _ in changed), default=0)
    return "\n".join(
        f"  {name:<{width}} = {value!r}  ({settings.origins.get(name, 'set by the program')})"
        for name, value in changed
    )
