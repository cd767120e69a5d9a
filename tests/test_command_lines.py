"""The whole path through the command lines, and what each says to bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from nanosynth import checkpoint
from tiny import REPO, RUN, SCRIPTS, command, flags, losses, read_metrics, torchrun


def succeed(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(done: subprocess.CompletedProcess) -> str:
    """The one line that a mistake is answered with."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_from_conversations_to_samples(conversations_file, tmp_path):
    data_dir, out_dir = tmp_path / "data", tmp_path / "out"
    prepared = command("prepare.py", f"--source={conversations_file}", f"--data_dir={data_dir}")
    assert "rows kept" in succeed(prepared)
    config = tmp_path / "tiny.py"
    config.write_text("".join(f"{name} = {value!r}\n" for name, value in RUN.items()))
    train = ["train.py", config, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_steps=5"]
    said = succeed(command(*train))
    assert "max_steps" in said and "(command line)" in said and f"({config})" in said
    assert len(losses(read_metrics(out_dir))) == 5
    facts = json.loads((out_dir / "config.json").read_text())
    assert facts["settings"]["max_steps"] == 5 and facts["world_size"] == 1
    assert (out_dir / "latest").read_text() == (out_dir / "best").read_text() == "step_000005"

    scored = succeed(command("eval_ppl.py", f"--run={out_dir}", "--dtype=float32"))
    figures = json.loads((out_dir / "eval_ppl.json").read_text())
    assert f"{figures['all']['perplexity']:,.3f}" in scored
    by_two = torchrun(2, "eval_ppl.py", f"--run={out_dir}", "--dtype=float32", "--device=cpu")
    succeed(by_two)
    again = json.loads((out_dir / "eval_ppl.json").read_text())
    assert again["all"]["perplexity"] == pytest.approx(figures["all"]["perplexity"], rel=1e-6)

    sample = ["sample.py", f"--run={out_dir}", "--max_new_tokens=4"]
    succeed(command(*sample, f"--prompts={data_dir}/val.bin", "--num_prompts=3"))
    records = [json.loads(line) for line in (out_dir / "generations.jsonl").open()]
    assert len(records) == 3 and all("text" in record for record in records)
    assert succeed(command(*sample, "--prompt=Hi", "--num_samples=2")).endswith("\n")

    os.truncate(out_dir / "step_000005" / checkpoint.MODEL, 1000)
    torn = fail(command("eval_ppl.py", f"--run={out_dir}"))
    assert "step_000005/model.safetensors has 1000 bytes" in torn


def test_a_torn_checkpoint_is_said_aloud(tiny_bins, run_dir, tmp_path):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    os.truncate(out_dir / "step_000006" / checkpoint.MODEL, 1000)
    done = command("train.py", *flags(**{**RUN, "data_dir": tiny_bins, "out_dir": out_dir}))
    assert "damaged checkpoint" in succeed(done) and "step_000006" in done.stdout
    assert losses(read_metrics(out_dir)) == losses(read_metrics(run_dir))


PROGRAMS = (*(f"{script}.py" for script in SCRIPTS), "-m verdict", "-m convert.hf")


def a_setting(program: str) -> str:
    return {"-m convert.hf": "source"}.get(program, "seed")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_typo_is_said_before_torch_is_imported(program):
    typo = a_setting(program).replace("e", "", 1)
    done = command("-X", "importtime", *program.split(), f"--{typo}=1")
    assert done.returncode == 1
    assert f"{program.removeprefix('-m ')}: error: unknown setting {typo!r}" in done.stderr
    assert f"did you mean {a_setting(program)!r}?" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "nanosynth.settings" in imported and "torch" not in imported


@pytest.mark.parametrize("program", [*PROGRAMS, "-m benchmarks.step", "data/make_sample.py"])
def test_help(program):
    said = succeed(command(*program.split(), "--help"))
    assert f"usage: python {program}" in said and f"--{a_setting(program)}=" in said
    assert max(map(len, said.splitlines())) <= 100


def shell(line: str) -> subprocess.CompletedProcess:
    """A line of bash in the repository's root; `python` is this one."""
    line = f'python() {{ {sys.executable} "$@"; }}; {line}'
    kept = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], cwd=REPO, env=kept, capture_output=True, text=True)


@pytest.mark.parametrize("program", [*PROGRAMS, "-m convert.nanogpt", "data/make_sample.py"])
def test_help_for_a_reader_that_leaves(program):
    """0 where all of it fits into the pipe, else a shell's word for SIGPIPE."""
    done = shell(f"python {program} --help | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 141) and not done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("stdin", ["</dev/null", "<&-", "< <(echo Hi)"])
def test_a_chat_without_a_terminal(stdin, run_dir):
    """It ends with its input, answers to what there is, and says no more than on a terminal."""
    done = shell(f"python sample.py --run={run_dir} --chat --device=cpu --max_new_tokens=2 {stdin}")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count("you> ") == 1 + ("Hi" in stdin)


@pytest.mark.parametrize("program", ["train.py", "-m verdict", "-m benchmarks.step"])
@pytest.mark.parametrize("module", ["difflib", "torch"])  # the settings' own, and the last
def test_an_interrupted_import_is_silent(program, module, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = command(*program.split())
    assert done.returncode == -signal.SIGINT and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train.py", "config/nothing.py"], "train.py: error: no config file 'config/nothing.py'"),
        (["train.py", "--data_dir=missing"], "no prepared data in 'missing' (no meta.json)"),
        (["prepare.py", "--source=missing.jsonl"], "no source 'missing.jsonl'"),
        (
            ["prepare.py", "--max_rows=1e5"],
            "max_rows in the command line: wanted int, 0 or more, got 100000.0",
        ),
        (["sample.py", "--run=missing", "--prompt=x"], "no checkpoint in 'missing'"),
        (["sample.py", "--run=missing"], "wanted one of --prompt=TEXT, --prompts=FILE and --chat"),
        (["eval_ppl.py", "--run=missing"], "no checkpoint in 'missing'"),
    ],
)
def test_bad_input_is_answered_with_one_line(arguments, wanted):
    assert wanted in fail(command(*arguments))


def test_warmup_longer_than_the_run(tiny_bins, tmp_path):
    settings = {**RUN, "data_dir": tiny_bins, "out_dir": tmp_path, "warmup_steps": 1000}
    said = fail(command("train.py", *flags(**settings)))
    assert "warmup_steps=1000, but the run has 6 steps" in said and "--warmup_steps=0" in said


def test_a_source_without_conversations(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"title": "x"}\n')
    done = command("prepare.py", f"--source={source}", f"--data_dir={tmp_path / 'data'}")
    fail(done)
    assert "columns found: title" in done.stderr
