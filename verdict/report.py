"""report.md, report.json and curves.png: the criteria, every figure, and how each was come by."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

from nanosynth import UserError
from nanosynth.files import write_atomically
from nanosynth.table import table
from verdict import criteria, curves
from verdict.criteria import FAIL, GPU_HOURS, NOT_MEASURED, PASS, Events, Judgement
from verdict.figures import answers, figures, leaves, loss_at
from verdict.runs import Run
from verdict.schemas import KINDS

LIMITS = (
    "No human has judged the texts, and no other model has.",
    "The validation split is drawn from the training data's source, by a hash of the seed and the "
    "first user turn (case and spaces apart): one first turn never stands on both sides, but "
    "near-copies with another may, and nothing here tells how the model does on other text.",
    "Where an interval reaches over its threshold, another sample could turn the verdict.",
    f"The budget of a run is {GPU_HOURS:g} GPU-hour. Hours are added up from each step's speed: "
    "start-up, saving, and steps that a resume took back are in no record. MFU is of the device's "
    "dense 16-bit peak, where that is known.",
    "The gap compares with training loss on rows before they are learnt: in a first epoch it shows "
    "how the splits differ, not what was memorised.",
    "Losses compare only at equal data, loss_on, block_size and eval_rows, and a difference below "
    "the spread over seeds is none.",
)


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# How a criterion's figure stands in the headline.
IN_SHORT = {"perplexity": "{:,.2f}", "coherence": "{:.1%}", "reproducibility": "spread {:.1%}"}


def headline(judgements: list[Judgement], recipe: list[Run]) -> str:
    """One line: yes or no where that is known, what is known of each criterion, what is missing."""
    known, missing = [], []
    for name in criteria.THRESHOLDS:
        of = [judged for judged in judgements if judged.criterion == name]
        verdict = min((judged.verdict for judged in of), key=(FAIL, NOT_MEASURED, PASS).index)
        if verdict == NOT_MEASURED:
            missing.append(f"{name} {SECOND_SEED if is_one_seed(of[0]) else 'is not measured'}")
            continue
        values = [judged.figure for judged in of if judged.figure is not None]
        ends = [IN_SHORT.get(name, "").format(end) for end in (min(values), max(values))]
        known.append(" ".join(filter(None, [name, " to ".join(dict.fromkeys(ends)), verdict])))
    if any(run.finished is False for run in recipe):
        missing.append("training is not finished")
    verdicts = {judged.verdict for judged in judgements}
    answer = ["no"] if FAIL in verdicts else ["yes"] if verdicts == {PASS} else []
    said = "; ".join(filter(None, [", ".join(known), *missing]))
    return ": ".join([", ".join(run.path for run in recipe), *answer, said])


SECOND_SEED = "needs a second seed"


def is_one_seed(judged: Judgement) -> bool:
    """Whether its question, how well seeds agree, is not asked yet."""
    return judged.criterion == "reproducibility" and len(judged.runs) == 1


def criteria_table(judgements: list[Judgement], *, markdown: bool) -> str:
    rows = [["criterion", "run", "threshold", "figure", "95% interval", "verdict"]]
    for judged in judgements:
        interval = " to ".join(map(shown, judged.interval or ())) or "-"
        facts = [criteria.THRESHOLDS[judged.criterion], shown(judged.figure), interval]
        verdict = SECOND_SEED if is_one_seed(judged) else judged.verdict
        rows.append([judged.criterion, ", ".join(judged.runs), *facts, verdict])
    return table(rows, left=(0, 1, 2, 5), markdown=markdown)


def criteria_section(judgements: list[Judgement]) -> str:
    remarks = []
    for judged in judgements:
        command = f"; to measure it: `{judged.command}`" if judged.command else ""
        remarks.append(f"{judged.criterion}, {', '.join(judged.runs)}: {judged.remark}{command}")
    how = [f"**{name}**: {text}" for name, text in criteria.HOW.items()]
    parts = [criteria_table(judgements, markdown=True), bullets(remarks)]
    return "\n\n".join([*parts, "How each is measured:", bullets(how)])


def figures_section(recipes: list[list[Run]]) -> tuple[str, dict]:
    """Every figure of every run side by side, with the spread over the seeds of a recipe."""
    runs = [run for recipe in recipes for run in recipe]
    by_run = {run.path: figures(run) for run in runs}
    evaluated = [loss_at(run) for run in runs]  # losses by tokens seen
    tokens = max(set.intersection(*map(set, evaluated)), default=None)
    if len(runs) > 1 and tokens is not None:
        for run, losses in zip(runs, evaluated, strict=True):
            by_run[run.path][f"validation loss at {tokens:,} tokens"] = losses[tokens]
    names = dict.fromkeys(name for values in by_run.values() for name in values)
    if len(runs) == 1:  # its answers have a table of their own
        names = [name for name in names if name.partition(": ")[0] not in answers(runs[0])]
    rows = [["figure", *by_run]]
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [str(run.settings.get(name, "-")) for run in runs]
        rows += [[f"--{name}", *values]] if len(set(values)) > 1 else []  # where the recipes differ
    rows += [[name, *(shown(values.get(name)) for values in by_run.values())] for name in names]
    parts, spread = [table(rows, markdown=True)], {}
    for recipe in recipes:
        seeds = {run.path: by_run[run.path] for run in recipe if run.finished}
        if len(seeds) > 1:
            key = ", ".join(seeds)
            shared = [name for name in names if all(name in values for values in seeds.values())]
            spread[key] = {n: spread_of([values[n] for values in seeds.values()]) for n in shared}
            rows = [["figure", "mean", "standard deviation", "lowest", "highest"]]
            rows += [[name, *map(shown, values.values())] for name, values in spread[key].items()]
            title = f"Over {len(seeds)} finished seeds of one recipe, {key}:"
            parts += [title, table(rows, markdown=True)]
    return "\n\n".join(parts), {"by_run": by_run, "spread": spread}


def spread_of(values: list[float]) -> dict[str, float]:
    mean = fmean(values)
    return {"mean": mean, "stdev": stdev(values), "lowest": min(values), "highest": max(values)}


def answers_section(run: Run) -> str:
    """What was measured on answers, a column for each set of prompts and way of answering."""
    columns = answers(run)
    intervals = [" to ".join(map(shown, mode["coherent"]["interval"])) for mode in columns.values()]
    by_column = [dict(leaves(mode)) for mode in columns.values()]
    rows = [
        ["figure", *columns],
        ["answers", *(f"{m['coherent']['n']:,}" for m in columns.values())],
    ]
    for name in dict.fromkeys(name for values in by_column for name in values):
        values = [values.get(name) for values in by_column]
        rows.append([name, *(shown(v if KINDS["number"](v) else None) for v in values)])
        if name == "coherent":
            rows.append(["coherent, 95% interval", *intervals])
    return table(rows, markdown=True) if columns else ""


def made_section(run: Run) -> str:
    """How the run was made, so that it can be made again."""
    lines = []
    for start in run.config.get("starts", ()):
        others = ", ".join(f"{key} {value}" for key, value in start.items() if key != "command")
        lines.append(f"`{start['command']}`: {others}")
    facts = {key: value for key, value in run.config.items() if key != "starts"}
    facts |= {f"data, {key}": value for key, value in run.data.items()}
    return bullets([*lines, *(f"{key}: `{json.dumps(value)}`" for key, value in facts.items())])


def tasks_section(run: Run) -> str:
    """Zero-shot scores beside chance and other models' published figures."""
    rows = [["task", "metric", "model", "score", "standard error", "source"]]
    for task, scored in run.tasks.get("zero_shot", {}).items():
        own = [shown(scored["score"]), shown(scored.get("stderr")), f"n = {scored['n']:,}"]
        rows.append([task, scored["metric"], run.path, *own])
        rows.append([task, scored["metric"], "chance", shown(scored.get("chance")), "-", "-"])
        for other in run.tasks.get("published", {}).get(task, ()):
            theirs = [other["model"], shown(other["score"]), "-", other["source"]]
            rows.append([task, other.get("metric", "-"), *theirs])
    return table(rows, left=(0, 1, 2, 5), markdown=True) if len(rows) > 1 else ""


def samples_section(run: Run, count: int) -> str:
    """Answers to the first `count` prompts: held-out ones, sampled, where the file has several."""
    firsts = [sample for sample in run.samples if not sample.get("sample")]  # of each prompt
    chosen = [s for s in firsts if (s.get("set"), s.get("mode")) == ("validation", "sampled")]
    chosen = (chosen or firsts)[:count]
    if not chosen:
        return ""
    parts = [
        f"The first {len(chosen)} prompts of `{run.samples_file}`, answers whole and unedited."
    ]
    for sample in chosen:
        page = f"{sample['prompt']}{sample['text']}".splitlines()
        coherent = sample.get("coherent", "not judged")
        end = f"[{sample['finish']}, {sample['tokens']} tokens, coherent: {coherent}]"
        parts.append("\n".join(f"    {line}".rstrip() for line in (*page, end)))
    return "\n\n".join(parts)


def compose(runs: list[Run], events: dict[str, Events], n_samples: int) -> tuple[str, dict, str]:
    """The texts of report.md, of report.json as an object, and what the terminal shows."""
    recipes = criteria.recipes(runs)
    judged = [criteria.judge(recipe, events) for recipe in recipes]
    headlines = [headline(*pair) for pair in zip(judged, recipes, strict=True)]
    every = [judgement for judgements in judged for judgement in judgements]
    text, summary_of_figures = figures_section(recipes)
    notes = [note for run in runs for note in run.notes]
    parts = ["# Was pure synthetic data enough?", *(f"**{line}**" for line in headlines)]
    parts += [criteria_section(every), "Left out, or not in agreement:", bullets(notes or ["none"])]
    parts += ["## Figures", text, "![curves](curves.png)"]
    for run in runs:
        sections = {
            f"## Answers of {run.path}": answers_section(run),
            f"## Zero-shot tasks of {run.path}": tasks_section(run),
            f"## How {run.path} was made": made_section(run),
            f"## Samples of {run.path}": samples_section(run, n_samples),
        }
        parts += [part for pair in sections.items() if pair[1] for part in pair]
    summary = {
        "format_version": 1,
        "headlines": headlines,
        "criteria": [asdict(j) | {"threshold": criteria.THRESHOLDS[j.criterion]} for j in every],
        "how": criteria.HOW,
        "figures": summary_of_figures,
        "events": {path: found._asdict() for path, found in events.items()},
        "runs": {run.path: {"config": run.config, "data": run.data} for run in runs},
        "notes": notes,
    }
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON has no NaN
    text = "\n\n".join([*parts, "## Limits", bullets(LIMITS)]) + "\n"
    return text, summary, "\n".join([*headlines, "", criteria_table(every, markdown=False)])


def write(runs: list[Run], folder: Path, n_samples: int) -> str:
    """Write the three files; what the terminal shows of them."""
    events = {run.path: criteria.find_events(run.train) for run in runs}
    text, summary, in_short = compose(runs, events, n_samples)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.md", text)
        write_atomically(folder / "report.json", json.dumps(summary, indent=2))
        curves.draw(runs, events, folder / "curves.png")
    except OSError as error:
        raise UserError(f"cannot write the report: {error}; use another --output_dir") from error
    return f"{in_short}\n\nwritten: {folder / 'report.md'}, report.json, curves.png"
