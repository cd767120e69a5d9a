import re
from dataclasses import dataclass
from typing import Literal

import pytest

import train
from nanosynth import UserError, settings
from nanosynth.settings import setting
from tiny import REPO


@dataclass(frozen=True, kw_only=True)
class Example:
    """What this example does."""

    learning_rate: float = setting(0.1, "the peak, per step")
    max_steps: int = setting(10, "how many")
    bias: bool = setting(True, "whether")
    name: str = setting("x", "what")
    revision: str | None = setting(None, "which")
    dtype: Literal["auto", "float16"] = setting("auto", "precision")
    compile: bool | Literal["auto"] = setting("auto", "when")
    run: settings.MANY = setting(("a",), "which ones")


def load(*argv: str) -> Example:
    return settings.load(Example, list(argv), "example.py", config_file=True)[0]


def refuses(match: str, *argv: str) -> None:
    with pytest.raises(UserError, match=match):
        load(*argv)


def write_config(tmp_path, text: str) -> str:
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def test_flags_override_the_file_which_overrides_defaults(tmp_path):
    path = write_config(tmp_path, "max_steps = 20\nname = 'file'\n")
    found, origins = settings.load(Example, [path, "--name=flag"], "x.py", config_file=True)
    assert found == Example(max_steps=20, name="flag")
    assert origins["max_steps"] == path and origins["name"] == "command line"
    assert origins["bias"] == "default"


def test_a_flag_of_many_values_is_given_several_times(tmp_path):
    path = write_config(tmp_path, "run = ('x', 'y')\n")
    assert load(path).run == ("x", "y")
    assert load(path, "--run=b", "--run=c").run == ("b", "c")
    refuses("run in .*: wanted str ..., got 'x'", write_config(tmp_path, "run = 'x'\n"))


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--max_steps=12", {"max_steps": 12}),
        ("--learning_rate=3e-4", {"learning_rate": 3e-4}),
        ("--learning_rate=2", {"learning_rate": 2.0}),
        ("--bias", {"bias": True}),
        ("--bias=false", {"bias": False}),
        ("--bias=True", {"bias": True}),
        ("--name=12", {"name": "12"}),
        ("--run=b", {"run": ("b",)}),
        ("--name=a=b --c", {"name": "a=b --c"}),
        ("--name=", {"name": ""}),
        ("--name=True", {"name": "True"}),
        ("--revision=main", {"revision": "main"}),
        ("--dtype=float16", {"dtype": "float16"}),
        ("--compile=False", {"compile": False}),
        ("--compile=auto", {"compile": "auto"}),
    ],
)
def test_a_flag_is_read_by_its_type(flag, wanted):
    found = load(flag)
    assert found == Example(**wanted)
    name, value = next(iter(wanted.items()))
    assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--max_steps=1.0", "wanted int, got 1.0"),
        ("--max_steps=1e3", "wanted int, got 1000.0"),
        ("--max_steps=True", "wanted int, got True"),
        ("--max_steps=ten", "wanted int, got 'ten'"),
        ("--max_steps=", "wanted int, got ''"),
        ("--learning_rate=True", "wanted float, got True"),
        ("--learning_rate=fast", "wanted float, got 'fast'"),
        ("--bias=1", "wanted bool, got 1"),
        ("--bias=yes", "wanted bool, got 'yes'"),
        ("--dtype=float8", r"wanted auto\|float16, got 'float8'"),
        ("--compile=1", r"wanted bool\|auto, got 1"),
    ],
)
def test_a_wrong_type_is_refused(flag, wanted):
    refuses(wanted, flag)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("max_steps = 1.0", "max_steps in .*: wanted int, got 1.0"),
        ("learning_rate = '0.1'", "wanted float, got '0.1'"),
        ("bias = 1", "wanted bool, got 1"),
        ("name = 5", "wanted str, got 5"),
        ("name = None", "wanted str, got None"),
        ("learnin_rate = 0.1", "'learnin_rate' in .*config.py; did you mean 'learning_rate'"),
        ("max_steps = 1 / 0", "config.py: ZeroDivisionError: division by zero"),
        ("max_steps = (", "config.py: SyntaxError"),
    ],
)  # fmt: skip
def test_a_wrong_config_file_is_refused(tmp_path, line, wanted):
    refuses(wanted, write_config(tmp_path, line))


def test_a_file_widens_int_to_float_and_keeps_its_helpers(tmp_path):
    path = write_config(tmp_path, "_epochs = 3\nlearning_rate = _epochs\nrevision = None\n")
    found = load(path)
    assert found == Example(learning_rate=3.0) and type(found.learning_rate) is float


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--learning_rat=1", "did you mean 'learning_rate'"), ("--zzz=1", "see --help")],
)
def test_an_unknown_flag_names_the_nearest(flag, hint):
    refuses(f"unknown setting '.*' in the command line; {hint}", flag)


@pytest.mark.parametrize("flag", ["--max_steps", "-max_steps=1", "--name", "-x"])
def test_a_flag_without_value_is_refused(flag):
    refuses("flags are written --key=value", flag)


def test_stray_arguments_are_refused(tmp_path):
    path = write_config(tmp_path, "")
    refuses("unexpected argument 'more'; wanted one config file", path, "more")
    refuses("no config file 'missing.py'", "missing.py")
    with pytest.raises(UserError, match="unexpected argument 'x.py'; wanted flags only"):
        settings.load(Example, ["x.py"], "example.py")


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        load("--help", "--nonsense=1")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "What this example does." in text and "python example.py [config/NAME.py]" in text
    assert re.search(r"--learning_rate +float +0\.1 +the peak, per step", text)
    assert re.search(r"--revision +str\|None +None +which", text)
    assert re.search(r"--compile +bool\|auto +'auto' +when", text)


def test_describe_shows_values_and_origins():
    found, origins = settings.load(Example, ["--max_steps=5"], "example.py")
    text = settings.describe(found, origins)
    assert re.search(r"max_steps +(: int )?= 5 +\(command line\)", text)
    assert re.search(r"name += 'x' +\(default\)", text)


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    config, origins = settings.load(train.TrainConfig, [str(path)], "train.py", config_file=True)
    assert config.out_dir == f"out/{path.stem}"
    assert str(path) in origins.values()
