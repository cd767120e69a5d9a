"""Every setting of every script with values that nobody wants."""

import dataclasses

import pytest

from hostile.scripts import CONFIGS, complaints, config_class

NUMBERS = (
    *(
        "-1",
        "-0.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1e400",
        "2**64",
        "1" * 400,
        "1" * 5000,
        "0x",
        "²",
    ),
    *(
        "٣",
        "1,5",
        "1 2",
        "[]",
        "{}",
        "()",
        "'1'",
        "b'1'",
        "None",
        "True",
        "...",
        "[" * 5000,
        "lambda: 1",
    ),
)
WORDS = (
    "",
    " ",
    "nonsense",
    "x" * 70_000,
    "\x1b[31mred",
    "\udcff",
    "a\nb",
    "__import__('os').abort()",
)
PATHS = (
    "missing",
    "missing/" * 40,
    "x" * 300,
    "/dev/null/x",
    "\udcff\udcfe",
    "~nobody/x",
    "a\nb",
    "\x1b[2J",
)
# With these each ends before it computes, whatever one flag says.
BASE = {
    "prepare": ["--source=missing.jsonl", "--data_dir=missing"],
    "train": ["--data_dir=missing", "--out_dir=missing-out"],
    "sample": ["--run=missing", "--prompt=Hi"],
    "eval_ppl": ["--run=missing"],
    "verdict.__main__": ["--run=missing"],
    "convert.hf": ["--run=missing", "--to=missing-to"],
}


def values(field: dataclasses.Field) -> tuple[str, ...]:
    if field.metadata["path"]:
        return PATHS
    return (*NUMBERS, *WORDS)


@pytest.mark.parametrize("script", CONFIGS)
def test_every_setting(script, tmp_path, monkeypatch, capfd):
    """Some values are fine by themselves: then it is the missing folder that is refused."""
    monkeypatch.chdir(tmp_path)
    found, n_cases = [], 0
    for field in dataclasses.fields(config_class(script)):
        for value in values(field):
            flags = [*BASE[script], f"--{field.name}={value}"]
            n_cases += 1
            found += complaints(script, flags, capfd, tmp_path)
    assert not found, f"{len(found)} of {n_cases}: " + "\n".join(found[:20])


ARGUMENTS = (
    *(["-x"], ["--"], ["--=1"], ["--nonsense"], ["x.py"], ["-"], ["---seed=1"], ["--seed"]),
    *(["--\x1b[31m=1"], ["\udcff"], ["--" + "x" * 70_000], ["/"], ["a.py", "b.py"]),
)


@pytest.mark.parametrize("script", CONFIGS)
def test_arguments(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    cases = [[*BASE[script], *arguments] for arguments in ARGUMENTS]
    found = [c for flags in cases for c in complaints(script, flags, capfd, tmp_path)]
    assert not found, "\n".join(found)


CONFIG_FILES = {
    "empty": b"",
    "no UTF-8": b"name = '\xff'",
    "NUL": b"n_layer = 1\0",
    "a syntax error": b"n_layer = ",
    "deep": b"(" * 5000,
    "raises": b"1 / 0",
    "exits": b"import sys; sys.exit()",
    "interrupts nothing": b"n_layer = float('nan')",
    "not a number": b"n_layer = 'x'",
    "infinite": b"learning_rate = float('inf')",
    "a list": b"n_layer = [1]",
    "not a bool": b"bias = 1",
    "a function": b"def n_layer(): pass",
    "a class": b"class n_layer: pass",
    "unknown": b"n_leyer = 1",
    "control": b"x = '\x1b[31m'",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("kind", CONFIG_FILES)
def test_config_files(kind, tmp_path, capfd):
    path = tmp_path / "config.py"
    path.write_bytes(CONFIG_FILES[kind])
    found = complaints("train", [str(path), *BASE["train"]], capfd, tmp_path)
    assert not found, found


@pytest.mark.parametrize("path", ["folder", "dangling", "\x1b[31m", "x" * 300, "/dev/null"])
def test_config_files_that_are_none(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert not complaints("train", [path, *BASE["train"]], capfd, tmp_path)


SIZES = (
    *({"n_embd": 10_000_000_019}, {"n_embd": 999_983, "n_head": 2}, {"n_layer": 10**9}),
    *({"rows_per_step": 10**18}, {"micro_batch_size": 10**23}, {"block_size": 10**12}),
    *({"n_layer": 10_000, "n_embd": 100_000, "n_head": 1}, {"n_embd": 999_936, "n_layer": 1}),
    *({"gradient_accumulation_steps": 10**6}, {"gradient_accumulation_steps": 10**18}),
    *({"max_steps": 10**30}, {"epochs": 1e300}, {"hang_seconds": 1e10}, {"eval_interval": 0}),
    *({"seed": 2**64}, {"learning_rate": "1e999"}, {"warmup_steps": 10**30}, {"block_size": 10**7}),
)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_are_refused_before_anything_is_built(sizes, tiny_bins, tmp_path, capfd):
    flags = {"data_dir": tiny_bins, "out_dir": tmp_path / "run", "device": "cpu"}
    flags |= {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "max_steps": 2000}
    given = [f"--{name}={value}" for name, value in (flags | sizes).items()]
    assert not complaints("train", given, capfd, tmp_path)
