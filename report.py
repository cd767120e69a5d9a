"""The verdict on one run or several: the criteria, every figure, and how each was come by.

Usage:
    python report.py --run=out/500m
    python report.py --run=out/500m --run=out/500m-seed43 --run=out/1b
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from nanosynth import UserError, settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Print a report of what the runs' folders hold; write report.md, report.json, curves.png."""

    run: settings.MANY = setting(
        ("out/demo",), "a run's folder; give it again for more seeds, or to compare recipes"
    )
    output_dir: str = setting("", "where the report goes; empty: the first run's folder")
    samples: int = setting(5, "samples shown of each run: the first of its file")

    def __post_init__(self):
        folders = [Path(path).resolve() for path in self.run]
        if len(set(folders)) < len(folders):
            raise UserError(f"--run names a folder twice: {', '.join(self.run)}")
        if self.samples < 0:
            raise UserError(f"--samples={self.samples}; wanted 0 or more")


if __name__ == "__main__":
    arguments = settings.from_argv(ReportConfig)  # before torch takes its time

from statistics import fmean, stdev

from nanosynth import criteria, curves, facts, runs
from nanosynth.criteria import FAIL, NOT_MEASURED, PASS, Events, Judgement
from nanosynth.files import write_atomically

FORMATS = {  # by the first words of a figure's name; else three decimals
    **{"parameters": ",.0f", "steps": ",.0f", "tokens": ",.0f"},
    **{"validation loss": ".4f", "gap": "+.4f", "bits": ".4f", "perplexity": ",.3f"},
    **{"coherent": ".1%", "answers": ".1%", "MFU": ".1%"},
}
LIMITS = (
    "No human has judged the texts, and no other model has.",
    "The validation split comes from the same source as the training data: near-copies with "
    "another first turn may stand on both sides, and nothing here tells how the model does on "
    "text of another kind.",
    "Steps that a resume took back, and what happened in them, are in no record; the starts of a "
    "run are listed above. Start-up and saving are not in the hours.",
    "Training loss is taken on rows before they are learnt: in a first epoch the gap shows how the "
    "splits differ, not what was memorised.",
    "A difference between recipes that is below the spread over seeds is no difference.",
)


def table(rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as it stands; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return format(value, next((f for key, f in FORMATS.items() if name.startswith(key)), ".3f"))


def judge(recipes: list[list[runs.Run]], events: dict[str, Events]) -> list[list[Judgement]]:
    """The judgements of each recipe: three on each of its runs, one on all."""
    found = []
    for seeds in recipes:
        judged = {
            run.path: [
                criteria.perplexity(run),
                criteria.coherence(run),
                criteria.stability(run, events[run.path]),
            ]
            for run in seeds
        }
        by_criterion = [j for same in zip(*judged.values(), strict=True) for j in same]
        found.append([*by_criterion, criteria.reproducibility(seeds, judged)])
    return found


def headline(judgements: list[Judgement], seeds: list[runs.Run]) -> str:
    """One line: the answer, and what it rests on; of a run under way it is the answer so far."""
    verdicts = [judgement.verdict for judgement in judgements]
    answer = "yes" if set(verdicts) == {PASS} else "no" if FAIL in verdicts else "not known yet"
    if not all(run.finished for run in seeds):
        answer += ", training is not finished"
    parts = []
    for name in criteria.THRESHOLDS:
        of_this = [j.verdict for j in judgements if j.criterion == name]
        worst = next(v for v in (FAIL, NOT_MEASURED, PASS) if v in of_this)
        parts.append(f"{name} {worst}")
    return f"{', '.join(judgements[-1].runs)}: {answer} ({', '.join(parts)})"


def criteria_section(judgements: list[Judgement], loaded: list[runs.Run]) -> str:
    rows = [["criterion", "run", "threshold", "figure", "interval", "verdict"]]
    remarks = []
    for j in judgements:
        unit = "%" if j.criterion == "coherence" else ""
        scale = 100 if unit else 1
        ends = [f"{end * scale:,.4g}{unit}" for end in j.interval or ()]
        interval = " to ".join(ends) or "-"
        names = ", ".join(j.runs)
        threshold = criteria.THRESHOLDS[j.criterion]
        rows.append([j.criterion, names, threshold, j.text or "-", interval, j.verdict])
        if j.remark:
            remarks.append(f"- {j.criterion}, {names}: {j.remark}.")
        if j.command:
            remarks.append(f"- {j.criterion}, {names}: measure it with `{j.command}`")
    rules = {run.tasks["rule"] for run in loaded if run.tasks} or {"see eval_tasks.py"}
    how = criteria.HOW | {"coherence": criteria.HOW["coherence"] + "; ".join(sorted(rules))}
    remarks += [f"- {note}" for run in loaded for note in run.notes]
    measured = [f"- **{name}**: {text}" for name, text in how.items()]
    return "\n".join([table(rows), "", *remarks, "", "How each is measured:", "", *measured])


def figures_section(recipes: list[list[runs.Run]]) -> tuple[str, dict]:
    """Every figure of every run side by side, with the spread over the seeds of a recipe."""
    loaded = [run for seeds in recipes for run in seeds]
    found = {run.path: runs.figures(run) for run in loaded}
    if tokens := equal_tokens(loaded):
        for run in loaded:
            name = f"validation loss at {tokens:,} tokens"
            found[run.path][name] = runs.loss_at(run)[tokens]
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [["figure", *found]]
    rows += [[name, *(shown(name, found[run].get(name)) for run in found)] for name in names]
    text, spread = table(rows), {}
    for recipe in recipes:
        seeds = [run for run in recipe if run.finished]
        if len(seeds) > 1:
            of_recipe = {name: [found[run.path].get(name) for run in seeds] for name in names}
            key = ", ".join(run.path for run in seeds)
            spread[key] = {n: spread_of(v) for n, v in of_recipe.items() if None not in v}
            head = ["figure", "mean", "standard deviation", "lowest", "highest"]
            lines = [[n, *(shown(n, x) for x in s.values())] for n, s in spread[key].items()]
            text += f"\n\nOver {len(seeds)} finished runs of one recipe, {key}:\n\n"
            text += table([head, *lines])
    if len(recipes) > 1:
        text += "\n\n" + comparison(loaded, tokens)
    return text, {"by_run": found, "spread": spread}


def spread_of(values: list[float]) -> dict[str, float]:
    mean = fmean(values)
    return {"mean": mean, "stdev": stdev(values), "lowest": min(values), "highest": max(values)}


def equal_tokens(loaded: list[runs.Run]) -> int | None:
    """The most tokens after which every run was evaluated; None for one run, or no such place."""
    common = set.intersection(*(set(runs.loss_at(run)) for run in loaded))
    return max(common, default=None) if len(loaded) > 1 else None


def comparison(loaded: list[runs.Run], tokens: int | None) -> str:
    """What makes the recipes comparable, or not."""
    if tokens is None:
        text = "No evaluation of all runs falls on an equal number of tokens seen."
    else:
        text = f"The recipes are compared by validation loss at {tokens:,} tokens seen by each."
    for key in ("loss_on", "block_size", "eval_rows", "data_dir"):
        values = {str(run.config.get("settings", {}).get(key)) for run in loaded}
        if len(values) > 1:
            text += f" They differ in {key} ({', '.join(sorted(values))}): not a like comparison."
    return text


def tasks_section(run: runs.Run) -> str:
    """Generation quality and zero-shot tasks, as eval_tasks.py measured them."""
    rows = [["prompts", "answers", "n", "coherent", "instructions", "memorised", "distinct-1/2/3"]]
    rows[0] += ["self-BLEU", "compression", "parts of coherent"]
    for split, modes in run.tasks["generation"].items():
        for mode, m in modes.items():
            shares = [m[key] for key in ("coherent", "instructions", "memorised")]
            row = [split, mode, str(m["n"]), *(f"{s['share']:.1%}" if s else "-" for s in shares)]
            row.append("/".join(shown("distinct", value) for value in m["distinct"].values()))
            row += [shown(key, m[key]) for key in ("self_bleu", "compression_ratio")]
            parts = [f"{part} {shown('coherent', value)}" for part, value in m["parts"].items()]
            rows.append([*row, ", ".join(parts)])
    zero = [["task", "metric", "model", "parameters", "score", "standard error", "n", "source"]]
    for task, s in run.tasks["zero_shot"].items():
        own = [f"{run.config.get('parameters', 0):,}", shown(task, s["score"])]
        own += [shown(task, s["stderr"]), str(s["n"]), "measured"]
        zero.append([task, s["metric"], run.path, *own])
        zero.append([task, s["metric"], "chance", "-", shown(task, s["chance"]), "-", "-", "-"])
        for other in run.tasks["published"].get(task, ()):
            score = [f"{other['parameters']:,}", shown(task, other["score"]), "-", "-"]
            zero.append([task, s["metric"], other["model"], *score, other["source"]])
    return "\n\n".join(table(rows) for rows in (rows, zero) if len(rows) > 1)


def samples_section(run: runs.Run, count: int) -> str:
    """The first `count` of the file: of held-out prompts, sampled, where the file has several."""
    chosen = [s for s in run.samples if (s.get("set"), s.get("mode")) == ("validation", "sampled")]
    chosen = (chosen or run.samples)[:count]
    parts = [f"The first {len(chosen)} of `{run.samples_file}`, whole and unedited."]
    for sample in chosen:
        judged = {True: ", coherent", False: ", not coherent"}.get(sample.get("coherent"), "")
        page = f"{sample['prompt']}{sample['text']}".splitlines()
        end = f"[{sample['finish']}, {sample['tokens']} tokens{judged}]"
        parts.append("\n".join(f"    {line}".rstrip() for line in (*page, end)))
    return "\n\n".join(parts)


def finite(value: object) -> object:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compose(loaded: list[runs.Run], events: dict[str, Events], n_samples: int) -> tuple[str, dict]:
    """The texts of report.md and report.json, the latter as an object."""
    groups: dict[str, list[runs.Run]] = {}
    for run in loaded:
        groups.setdefault(criteria.recipe(run), []).append(run)
    recipes = list(groups.values())
    judged = judge(recipes, events)
    headlines = [headline(*pair) for pair in zip(judged, recipes, strict=True)]
    every = [judgement for judgements in judged for judgement in judgements]
    text, figures = figures_section(recipes)
    parts = ["# Was pure synthetic data enough?", *(f"**{line}**" for line in headlines)]
    parts += [criteria_section(every, loaded), "## Figures", text, "![curves](curves.png)"]
    for run in loaded:
        if run.tasks:
            parts += [f"## Tasks of {run.path}, step {run.tasks['step']}", tasks_section(run)]
    for run in loaded:
        parts += [f"## How {run.path} was made", facts.section(run, events[run.path])]
    for run in loaded:
        if run.samples and n_samples:
            parts += [f"## Samples of {run.path}", samples_section(run, n_samples)]
    parts += ["## Limits", "\n".join(f"- {limit}" for limit in LIMITS)]
    summary = {
        "format_version": 1,
        "headlines": headlines,
        "criteria": [asdict(j) | {"threshold": criteria.THRESHOLDS[j.criterion]} for j in every],
        "how": criteria.HOW,
        "figures": figures,
        "events": {path: found._asdict() for path, found in events.items()},
        "runs": {run.path: {"config": run.config, "data": run.data} for run in loaded},
        "notes": [note for run in loaded for note in run.notes],
    }
    return "\n\n".join(parts) + "\n", finite(summary)


def main(config: ReportConfig, origins: dict[str, str]) -> None:
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
        main(*arguments)
