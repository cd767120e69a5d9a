"""The verdict on one run or several: the criteria, every figure, and how each was come by.

Usage:
    python report.py --run=out/500m
    python report.py --run=out/500m --run=out/500m-seed43 --run=out/1b
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanosynth import UserError, settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class ReportConfig(settings.Settings):
    """Print a report of what the runs' folders hold; write report.md, report.json, curves.png."""

    run: settings.MANY = setting(
        ("out/demo",),
        "a run's folder; give it again for more seeds, or to compare recipes",
        path=True,
    )
    output_dir: str = setting("", "where the report goes; empty: the first run's folder", path=True)
    samples: int = setting(5, "samples shown of each run: the first of its file", at_least=0)

    def check(self) -> None:
        if len({Path(path).resolve() for path in self.run}) < len(self.run):
            raise UserError(f"--run names a folder twice: {', '.join(self.run)}")


if __name__ == "__main__":
    arguments = settings.from_argv(ReportConfig)  # before torch takes its time

from statistics import fmean, stdev

from nanosynth.files import write_atomically
from verdict import criteria, curves, runs
from verdict.criteria import FAIL, GPU_HOURS, NOT_MEASURED, PASS, Events, Judgement

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


def table(rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as it stands; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def worst(judgements: list[Judgement]) -> str:
    return min((j.verdict for j in judgements), key=(FAIL, NOT_MEASURED, PASS).index)


def headline(judgements: list[Judgement], recipe: list[runs.Run]) -> str:
    """One line: the answer, and what it rests on; of a run under way it is the answer so far."""
    answer = {FAIL: "no", NOT_MEASURED: "not known yet", PASS: "yes"}[worst(judgements)]
    if any(run.finished is False for run in recipe):
        answer += ", training is not finished"
    by_criterion = [
        f"{name} {worst([j for j in judgements if j.criterion == name])}"
        for name in criteria.THRESHOLDS
    ]
    return f"{', '.join(run.path for run in recipe)}: {answer} ({', '.join(by_criterion)})"


def criteria_section(judgements: list[Judgement]) -> str:
    rows, remarks = [["criterion", "run", "threshold", "figure", "interval", "verdict"]], []
    for j in judgements:
        names, interval = ", ".join(j.runs), " to ".join(map(shown, j.interval or ())) or "-"
        threshold = criteria.THRESHOLDS[j.criterion]
        rows.append([j.criterion, names, threshold, shown(j.figure), interval, j.verdict])
        command = f"; measure it with `{j.command}`" if j.command else ""
        remarks.append(f"{j.criterion}, {names}: {j.remark}{command}")
    how = [f"**{name}**: {text}" for name, text in criteria.HOW.items()]
    return "\n\n".join([table(rows), bullets(remarks), "How each is measured:", bullets(how)])


def figures_section(recipes: list[list[runs.Run]]) -> tuple[str, dict]:
    """Every figure of every run side by side, with the spread over the seeds of a recipe."""
    loaded = [run for recipe in recipes for run in recipe]
    found = {run.path: runs.figures(run) for run in loaded}
    evaluated = [runs.loss_at(run) for run in loaded]  # losses by tokens seen
    tokens = max(set.intersection(*map(set, evaluated)), default=None)
    if len(loaded) > 1 and tokens is not None:
        for run, losses in zip(loaded, evaluated, strict=True):
            found[run.path][f"validation loss at {tokens:,} tokens"] = losses[tokens]
    names = dict.fromkeys(name for values in found.values() for name in values)
    rows = [["figure", *found]]
    for name in dict.fromkeys(name for run in loaded for name in run.settings):
        values = [str(run.settings.get(name, "-")) for run in loaded]
        rows += [[f"--{name}", *values]] if len(set(values)) > 1 else []  # where the recipes differ
    rows += [[name, *(shown(values.get(name)) for values in found.values())] for name in names]
    parts, spread = [table(rows)], {}
    for recipe in recipes:
        seeds = {run.path: found[run.path] for run in recipe if run.finished}
        if len(seeds) > 1:
            key = ", ".join(seeds)
            spread[key] = of_recipe = {
                name: spread_of([values[name] for values in seeds.values()])
                for name in names
                if all(name in values for values in seeds.values())
            }
            rows = [["figure", "mean", "standard deviation", "lowest", "highest"]]
            rows += [[name, *map(shown, values.values())] for name, values in of_recipe.items()]
            parts += [f"Over {len(seeds)} finished seeds of one recipe, {key}:", table(rows)]
    return "\n\n".join(parts), {"by_run": found, "spread": spread}


def spread_of(values: list[float]) -> dict[str, float]:
    mean = fmean(values)
    return {"mean": mean, "stdev": stdev(values), "lowest": min(values), "highest": max(values)}


def made_section(run: runs.Run) -> str:
    """How the run was made, so that it can be made again."""
    lines = []
    for start in run.config.get("starts") or ():
        others = ", ".join(f"{key} {value}" for key, value in start.items() if key != "command")
        lines.append(f"`{start['command']}`: {others}")
    facts = {key: value for key, value in run.config.items() if key != "starts"}
    facts |= {f"data, {key}": value for key, value in run.data.items()}
    return bullets([*lines, *(f"{key}: `{json.dumps(value)}`" for key, value in facts.items())])


def tasks_section(run: runs.Run) -> str:
    """Zero-shot scores beside chance and other models' published figures."""
    rows = [["task", "metric", "model", "score", "standard error", "source"]]
    for task, scored in run.tasks["zero_shot"].items():
        own = [run.path, shown(scored["score"]), shown(scored["stderr"]), f"n = {scored['n']:,}"]
        rows += [[task, scored["metric"], *own]]
        rows += [[task, scored["metric"], "chance", shown(scored["chance"]), "-", "-"]]
        for other in run.tasks.get("published", {}).get(task, ()):
            theirs = [other["model"], shown(other["score"]), "-", other["source"]]
            rows += [[task, other.get("metric", "-"), *theirs]]
    return table(rows) if len(rows) > 1 else ""


def samples_section(run: runs.Run, count: int) -> str:
    """The first `count` of the file: of held-out prompts, sampled, where the file has several."""
    chosen = [s for s in run.samples if (s.get("set"), s.get("mode")) == ("validation", "sampled")]
    chosen = (chosen or run.samples)[:count]
    if not chosen:
        return ""
    parts = [f"The first {len(chosen)} of `{run.samples_file}`, whole and unedited."]
    for sample in chosen:
        page = f"{sample['prompt']}{sample['text']}".splitlines()
        coherent = sample.get("coherent", "not judged")
        end = f"[{sample['finish']}, {sample['tokens']} tokens, coherent: {coherent}]"
        parts.append("\n".join(f"    {line}".rstrip() for line in (*page, end)))
    return "\n\n".join(parts)


def compose(loaded: list[runs.Run], events: dict[str, Events], n_samples: int) -> tuple[str, dict]:
    """The texts of report.md and report.json, the latter as an object."""
    recipes = criteria.recipes(loaded)
    judged = [criteria.judge(recipe, events) for recipe in recipes]
    headlines = [headline(*pair) for pair in zip(judged, recipes, strict=True)]
    every = [judgement for judgements in judged for judgement in judgements]
    text, figures = figures_section(recipes)
    parts = ["## Figures", text, "![curves](curves.png)"]
    for run in loaded:
        if run.tasks and (text := run.attempt("tasks.json", "", tasks_section, run)):
            parts += [f"## Zero-shot tasks of {run.path}", text]
        if text := run.attempt("config.json", "", made_section, run):
            parts += [f"## How {run.path} was made", text]
        if text := run.attempt(run.samples_file, "", samples_section, run, n_samples):
            parts += [f"## Samples of {run.path}", text]
    notes = [note for run in loaded for note in run.notes]
    start = ["# Was pure synthetic data enough?", *(f"**{line}**" for line in headlines)]
    start += [criteria_section(every), "Left out, or not in agreement:", bullets(notes or ["none"])]
    summary = {
        "format_version": 1,
        "headlines": headlines,
        "criteria": [asdict(j) | {"threshold": criteria.THRESHOLDS[j.criterion]} for j in every],
        "how": criteria.HOW,
        "figures": figures,
        "events": {path: found._asdict() for path, found in events.items()},
        "runs": {run.path: {"config": run.config, "data": run.data} for run in loaded},
        "notes": notes,
    }
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON has no NaN
    return "\n\n".join([*start, *parts, "## Limits", bullets(LIMITS)]) + "\n", summary


def main(config: ReportConfig) -> None:
    loaded = [runs.read(path) for path in config.run]
    events = {run.path: criteria.find_events(run.train) for run in loaded}
    text, summary = compose(loaded, events, config.samples)
    folder = Path(config.output_dir or config.run[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.md", text)
        write_atomically(folder / "report.json", json.dumps(summary, indent=2))
        curves.draw(loaded, events, folder / "curves.png")
    except OSError as error:
        raise UserError(f"cannot write the report: {error}; use another --output_dir") from error
    print(text)
    print(f"written: {folder / 'report.md'}, report.json, curves.png")
    print("\n".join(summary["headlines"]))


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
