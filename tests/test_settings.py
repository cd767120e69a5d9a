import re
from dataclasses import dataclass
from typing import Literal

import pytest

import train
from nanosynth import UserError, settings
from nanosynth.settings import setting
from tiny import REPO


@dataclass(frozen=True, kw_only=True)
class Example(settings.Settings):
    """What this example does."""

    learning_rate: float = setting(0.1, "the peak, per step")
    max_steps: int = setting(10, "how many")
    bias: bool = setting(True, "whether")
    name: str = setting("x", "what")
    dtype: Literal["auto", "float16"] = setting("auto", "precision")
    compile: bool | Literal["auto"] = setting("auto", "when")
    run: settings.MANY = setting(("a",), "which ones", path=True)
    seed: int = setting(42, "of all that is drawn", group="Chance", at_least=0)
    share: float = setting(0.5, "of the rows", above=0, below=1)
    rows: int | Literal["auto"] = setting("auto", "at once", at_least=1, at_most=100)
    folder: str = setting("out/x", "where", path=True)
    other: str = setting("", "where else", path=True)


def load(*argv: str) -> Example:
    return settings.load(Example, list(argv), "example.py", config_file=True)


def refuses(match: str, *argv: str) -> None:
    with pytest.raises(UserError, match=match):
        load(*argv)


def write_config(tmp_path, text: str) -> str:
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def test_flags_override_the_file_which_overrides_defaults(tmp_path):
    path = write_config(tmp_path, "max_steps = 20\nname = 'file'\n")
    found = load(path, "--name=flag")
    assert found == Example(max_steps=20, name="flag")
    assert found.origins["max_steps"] == path and found.origins["name"] == "command line"
    assert found.origins["bias"] == "default"


def test_a_flag_of_many_values_is_given_several_times(tmp_path):
    path = write_config(tmp_path, "run = ('x', 'y')\n")
    assert load(path).run == ("x", "y")
    assert load(path, "--run=b", "--run=c").run == ("b", "c")
    assert load(write_config(tmp_path, "run = 'x'\n")).run == ("x",)
    refuses("run in .*: wanted str, several times, got 5", write_config(tmp_path, "run = 5\n"))


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
        ("--dtype=float16", {"dtype": "float16"}),
        ("--compile=False", {"compile": False}),
        ("--compile=auto", {"compile": "auto"}),
        ("--seed=0", {"seed": 0}),
        ("--rows=auto", {"rows": "auto"}),
        ("--rows=100", {"rows": 100}),
        ("--other=", {"other": ""}),
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
        ("--seed=x", "wanted int, 0 or more, got 'x'"),
        ("--share=" + "(" * 10_000, "wanted float, above 0, below 1, got"),
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
        ("seed = -1", "--seed=-1; wanted 0 or more"),
        ("import sys\nsys.exit(3)", "config.py: SystemExit: 3"),
        ("", "config.py sets nothing; wanted assignments, as n_layer = 24"),
        ("# n_layer = 24", "config.py sets nothing"),
        ("_n = 3", "config.py sets nothing"),
        ('{"max_steps": 1}', "config.py, line 1: wanted assignments"),
        ("max_steps: 1", "config.py, line 1: wanted assignments"),
        ("bias = True\nmax_steps: 1", "config.py, line 2: wanted assignments"),
    ],
)  # fmt: skip
def test_a_wrong_config_file_is_refused(tmp_path, line, wanted):
    refuses(wanted, write_config(tmp_path, line))


def test_a_file_widens_int_to_float_and_keeps_its_helpers(tmp_path):
    path = write_config(tmp_path, "_epochs = 3\nlearning_rate = _epochs\n")
    found = load(path)
    assert found == Example(learning_rate=3.0) and type(found.learning_rate) is float
    path = write_config(tmp_path, '"""Doc."""\nimport math\nmax_steps: int = int(math.pi)\n')
    assert load(path) == Example(max_steps=3)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("--max_steps 12", {"max_steps": 12}),
        ("--seed 0 --name x", {"seed": 0, "name": "x"}),
        ("--run b --run c", {"run": ("b", "c")}),
        ("--bias false", {"bias": False}),
        ("--bias --seed 3", {"bias": True, "seed": 3}),
        ("--compile --max_steps=3", {"compile": True, "max_steps": 3}),
        ("--compile auto", {"compile": "auto"}),
        ("--name -x", {"name": "-x"}),
    ],
)
def test_a_value_may_follow_its_flag(argv, wanted):
    assert load(*argv.split()) == Example(**wanted)


def test_a_switch_does_not_swallow_the_config_file(tmp_path):
    path = write_config(tmp_path, "max_steps = 3\n")
    assert load("--compile", path) == Example(max_steps=3, compile=True)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--seed=-1", "--seed=-1; wanted 0 or more"),
        ("--share=0", "--share=0.0; wanted above 0, below 1"),
        ("--share=1", "--share=1.0; wanted above 0, below 1"),
        ("--share=1e999", "--share=inf; wanted a finite number, above 0, below 1"),
        ("--learning_rate=1e999", "--learning_rate=inf; wanted a finite number"),
        ("--rows=0", "--rows=0; wanted 1 or more, at most 100"),
        ("--rows=101", "--rows=101; wanted 1 or more, at most 100"),
        ("--folder=", "--folder=; wanted a path"),
        ("--run=", "wanted a path"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_its_flag(flag, wanted):
    refuses(f"^{re.escape(wanted)}" if wanted.startswith("--") else wanted, flag)


def test_bounds_hold_however_settings_are_made():
    with pytest.raises(UserError, match="^--learning_rate=nan; wanted a finite number"):
        Example(learning_rate=float("nan"))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    found = load(write_config(tmp_path, "folder = '~/x'\n"), "--run=~/a", "--run=b", "--name=~")
    assert (found.folder, found.run, found.name) == (
        "/home/someone/x",
        ("/home/someone/a", "b"),
        "~",
    )


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--learning_rat=1", "did you mean 'learning_rate'"), ("--zzz=1", "see --help")],
)
def test_an_unknown_flag_names_the_nearest(flag, hint):
    refuses(f"unknown setting '.*' in the command line; {hint}", flag)


@pytest.mark.parametrize("flag", ["-max_steps=1", "-x"])
def test_a_flag_of_one_dash_is_refused(flag):
    refuses("flags are written --key=value", flag)


@pytest.mark.parametrize("argv", [["--max_steps"], ["--name", "--bias"]])
def test_a_flag_without_value_is_refused(argv):
    refuses(f"{argv[0]} wants a value, written {argv[0]}=value", *argv)


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
    assert re.search(r"--learning_rate=0\.1 +the peak, per step \(float\)", text)
    assert re.search(r"--compile=auto +when \(bool\|auto\)", text)
    assert re.search(r"\n\nChance\n  --seed=42 +of all that is drawn \(int, 0 or more\)", text)


@pytest.mark.parametrize("columns", [80, 100, 300])
def test_help_fits_its_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        settings.load(train.TrainConfig, ["--help"], "train.py", config_file=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "usage" not in line) <= min(columns, 100)


def test_describe_shows_what_differs_and_where_it_comes_from():
    assert settings.describe(load("--max_steps=5")) == "  max_steps = 5  (command line)"
    assert settings.describe(load()) == ""


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    config = settings.load(train.TrainConfig, [str(path)], "train.py", config_file=True)
    assert config.out_dir == f"out/{path.stem}"
    assert str(path) in config.origins.values()
