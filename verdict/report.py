"""report.html, report.md, report.json and curves.png: the criteria, every figure, and how each was
come by.

The facts are gathered once, as values; templates/ arranges them for a browser and as Markdown.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from textwrap import indent
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from nanosynth import UserError, terminal
from nanosynth.files import write_atomically
from nanosynth.schema import KINDS
from nanosynth.table import table
from nanosynth.terminal import harmless, one_line
from verdict import control, criteria, curves, quality
from verdict.criteria import (
    FAIL,
    GPU_HOURS,
    NOT_MEASURED,
    PASS,
    SECOND_SEED,
    Judgement,
)
from verdict.figures import answers, by_label, by_position, figures, leaves, loss_at
from verdict.runs import Run

LIMITS = (
    "No human has judged the texts, and no other model has.",
    "The validation split is drawn from the training data's source, by a hash of the seed and the "
    "first user turn (case and spaces apart): one first turn never stands on both sides, but "
    "near-copies with another may, and nothing here tells how the model does on other text.",
    "Where an interval reaches over its threshold, another sample could turn the verdict.",
    f"The budget of a run is {GPU_HOURS:g} device-hour, everything included, as the run itself "
    "counts it in metrics.jsonl. Hours, and device-hours of a run that did not count them, are "
    "added up from each step's speed: start-up, saving, and steps that a resume took back are in "
    "no record. MFU is of the device's dense 16-bit peak, where that is known.",
    "The gap compares with training loss on rows before they are learnt: in a first epoch it shows "
    "how the splits differ, not what was memorised.",
    "Losses compare only at equal data, loss_on, block_size and eval_rows, and a difference below "
    "the spread over seeds is none.",
)
ABOUT_CONTROL = (
    "A difference is the run's less the control's; fewer bits are better. Its interval resamples "
    "the documents, questions or prompts that both had. One in twenty would look larger than its "
    "interval by chance alone, and another seed may move each."
)
MOST_ANSWERS = 5000  # of a run in report.html; a browser searches so many at once


class Table(NamedTuple):
    """Rows of values, the first the head; `left` are the columns of text."""

    rows: list[Sequence]
    left: tuple[int, ...] = (0,)

    def cells(self) -> list[list[str]]:
        return [list(map(shown, row)) for row in self.rows]


def shown(value: str | float | list[float] | None) -> str:
    """A number in four digits, of an interval both ends, - for what there is none of."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " to ".join(map(shown, value)) or "-"
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
            missing.append(f"{name} {SECOND_SEED if of[0].is_one_seed else 'is not measured'}")
            continue
        # Of a run that diverged there is none.
        values = sorted(judged.figure for judged in of if judged.figure is not None)
        ends = [IN_SHORT.get(name, "").format(end) for end in values[:1] + values[-1:]]
        known.append(" ".join(filter(None, [name, " to ".join(dict.fromkeys(ends)), verdict])))
    if any(run.finished is False for run in recipe):
        missing.append("training is not finished")
    verdicts = {judged.verdict for judged in judgements}
    answer = ["no"] if FAIL in verdicts else ["yes"] if verdicts == {PASS} else []
    said = "; ".join(filter(None, [", ".join(known), *missing]))
    return ": ".join([", ".join(run.path for run in recipe), *answer, said])


def criteria_table(judgements: list[Judgement]) -> Table:
    rows = [["criterion", "run", "threshold", "figure", "95% interval", "verdict"]]
    for judged in judgements:
        asked = [judged.criterion, ", ".join(judged.runs), criteria.THRESHOLDS[judged.criterion]]
        rows.append([*asked, judged.figure, judged.interval, judged.in_words])
    return Table(rows, left=(0, 1, 2, 5))


def beside(columns: dict[str, dict]) -> Table:
    """Figures by name, a column for each of `columns`."""
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [[name, *(values.get(name) for values in columns.values())] for name in names]
    return Table([["figure", *columns], *rows])


def figures_by_run(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Every figure of every run; of several, the loss at the most tokens that all have seen too."""
    by_run, evaluated = {run.path: figures(run) for run in runs}, [loss_at(run) for run in runs]
    tokens = max(set.intersection(*map(set, evaluated)), default=None)
    if len(runs) > 1 and tokens is not None:
        for run, losses in zip(runs, evaluated, strict=True):
            by_run[run.path][f"validation loss at {tokens:,} tokens"] = losses[tokens]
    return by_run


def figures_table(runs: list[Run], by_run: dict[str, dict[str, float]]) -> Table:
    """Every figure of every run side by side, below the settings in which the runs differ."""
    columns: dict[str, dict] = {run.path: {} for run in runs}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = {run.path: str(run.settings.get(name, "-")) for run in runs}
        if len(set(values.values())) > 1:
            for path, value in values.items():
                columns[path][f"--{name}"] = value
    # The answers of a run that is alone have a table of their own.
    apart = answers(runs[0]) if len(runs) == 1 else ()
    for path, values in by_run.items():
        columns[path] |= {n: v for n, v in values.items() if n.partition(": ")[0] not in apart}
    return beside(columns)


def spread_over_seeds(
    recipes: list[list[Run]], by_run: dict[str, dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """By the names of the finished seeds of a recipe: how each figure that all have is spread."""
    spread = {}
    for recipe in recipes:
        seeds = {run.path: by_run[run.path] for run in recipe if run.finished}
        if len(seeds) > 1:
            first, *others = seeds.values()
            shared = [name for name in first if all(name in values for values in others)]
            spread[", ".join(seeds)] = {
                name: spread_of([values[name] for values in seeds.values()]) for name in shared
            }
    return spread


def spread_table(spread: dict[str, dict[str, float]]) -> Table:
    rows = [[name, *values.values()] for name, values in spread.items()]
    return Table([["figure", "mean", "standard deviation", "lowest", "highest"], *rows])


def spread_of(values: list[float]) -> dict[str, float]:
    mean = fmean(values)
    return {"mean": mean, "stdev": stdev(values), "lowest": min(values), "highest": max(values)}


def answers_table(run: Run) -> Table:
    """What was measured on answers, a column for each set of prompts and way of answering."""
    columns = {}
    for name, mode in answers(run).items():
        coherent = mode["coherent"]
        columns[name] = {"answers": coherent["n"], "coherent": coherent["share"]}
        columns[name] |= {"coherent, 95% interval": coherent["interval"], **dict(leaves(mode))}
    return beside(columns)


def position_table(run: Run) -> Table:
    return Table([["tokens of context", "perplexity", "tokens"], *by_position(run)])


def label_table(use: str, rows: list[tuple]) -> Table:
    """By 'source' or 'category': which part of the data the run has learnt."""
    head = [use, "perplexity", "95% interval", "bits a byte", "tokens", "documents"]
    return Table([head, *rows])


def control_table(run: Run) -> Table:
    rows = [["figure", "of", run.path, "the control", "difference", "95% interval", "n"]]
    for found in run.control["differences"]:
        values = [found["run"], found["control"], control.signed(found["difference"])]
        rows.append([found["what"], found["of"], *values, found["interval"], found["n"]])
    return Table(rows, left=(0, 1))


def made_lines(run: Run) -> list[tuple[str, str]]:
    """(what, value) of how the run was made, so that it can be made again."""
    lines = []
    for start in run.config.get("starts", ()):
        others = ", ".join(f"{key} {value}" for key, value in start.items() if key != "command")
        lines.append((f"started, {others}", start["command"]))
    facts = {key: value for key, value in run.config.items() if key != "starts"}
    facts |= {f"data, {key}": value for key, value in run.data.items()}
    return [*lines, *((key, json.dumps(value)) for key, value in facts.items())]


def zero_shot(run: Run) -> list[dict]:
    """Each task's score and interval beside chance and other models' published figures."""
    published, found = run.tasks.get("published", {}), []
    for task, scored in run.tasks.get("zero_shot", {}).items():
        one = {"stderr": None, "chance": None, **scored, "task": task}
        half = 1.96 * one["stderr"] if KINDS["number"](one["stderr"]) else 0
        interval = [one["score"] - half, one["score"] + half]
        others = published.get(task, ())
        rings = [(other["model"], other["score"]) for other in others]
        found.append(one | {"interval": interval, "others": others, "rings": rings})
    return found


def tasks_table(run: Run) -> Table:
    rows = [["task", "metric", "model", "score", "standard error", "source"]]
    for scored in zero_shot(run):
        task, metric = scored["task"], scored["metric"]
        n = f"n = {scored['n']:,}"
        rows.append([task, metric, run.path, scored["score"], scored["stderr"], n])
        rows.append([task, metric, "chance", scored["chance"], None, None])
        for other in scored["others"]:
            theirs = [other["model"], other["score"], None, other["source"]]
            rows.append([task, other.get("metric"), *theirs])
    return Table(rows, left=(0, 1, 2, 5))


def finding(sample: dict) -> list[str]:
    """What the coherence rule says of an answer: 'coherent', or the parts that failed."""
    if "coherent" not in sample:
        return ["not judged"]
    failed = [FAILED[part] for part in quality.PARTS if sample.get(part) is False]
    return failed or ["coherent" if sample["coherent"] else "not coherent"]


FAILED = {part: f"failed: {part.replace('_', ' ')}" for part in quality.PARTS}


def chosen_samples(run: Run, count: int) -> dict[str, list[dict]]:
    """By finding: the first `count` answers of it to different prompts, in the order of the file.

    Held-out prompts, sampled, and the first sample of each, where the file has several. An answer
    that failed several parts stands at the first of them.
    """
    firsts = [sample for sample in run.samples if not sample.get("sample")]  # of each prompt
    held_out = [s for s in firsts if (s.get("set"), s.get("mode")) == ("validation", "sampled")]
    groups: dict[str, dict[str, dict]] = {}
    for sample in held_out or firsts:
        group = groups.setdefault(finding(sample)[0], {})
        if len(group) < count:
            group.setdefault(sample["prompt"], sample)
    order = ["coherent", *FAILED.values(), "not coherent", "not judged"]
    return {name: list(groups[name].values()) for name in order if groups.get(name)}


def gather(runs: list[Run], n_samples: int) -> dict:
    """What the templates show, beside what they make of a run by filters."""
    recipes = criteria.recipes(runs)
    judged = [criteria.judge(recipe) for recipe in recipes]
    by_run = figures_by_run([run for recipe in recipes for run in recipe])
    return {
        "runs": runs,
        "headlines": [headline(*pair) for pair in zip(judged, recipes, strict=True)],
        "judged": [judgement for judgements in judged for judgement in judgements],
        "notes": [note for run in runs for note in run.notes],
        "by_run": by_run,
        "spread": spread_over_seeds(recipes, by_run),
        "n_samples": n_samples,
        "most_answers": MOST_ANSWERS,
        "about_control": ABOUT_CONTROL,
        "limits": LIMITS,
    }


def in_markdown(value: object) -> object:
    """What a template shows of a text that may be anybody's: one line, and no HTML."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"<(?=[\w/!?])", "&lt;", one_line(value).replace("`", "'"))


def markdown(found: Table) -> Markup:
    rows = [list(map(in_markdown, row)) for row in found.cells()]
    return Markup(table(rows, left=found.left, markdown=True))


def labels_file(number: int) -> str:
    """The picture of a run's perplexity by source; runs are numbered from 1."""
    return "sources.png" if number == 1 else f"sources_{number}.png"


def code(text: str) -> Markup:
    return Markup(f"`{one_line(text).replace('`', chr(39))}`")


def indented(text: str) -> Markup:
    return Markup(indent(harmless(text), "    ", lambda line: True))


FILTERS = (
    *(code, indented, labels_file, markdown, shown),
    *(answers, by_label, by_position, chosen_samples, finding, made_lines, zero_shot),
    *(answers_table, control_table, criteria_table, figures_table, label_table, position_table),
    *(spread_table, tasks_table),
)


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of templates/. What comes into HTML is escaped."""
    is_markdown = name.endswith(".md")
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=not is_markdown,
        finalize=in_markdown if is_markdown else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {function.__name__: function for function in FILTERS}
    return found.get_template(name, globals={"criteria": criteria, "control": control})


def summary(facts: dict) -> dict:
    """report.json, as an object."""
    runs, thresholds = facts["runs"], criteria.THRESHOLDS
    found = {
        "format_version": 1,
        "headlines": facts["headlines"],
        "criteria": [asdict(j) | {"threshold": thresholds[j.criterion]} for j in facts["judged"]],
        "how": criteria.HOW,
        "figures": {"by_run": facts["by_run"], "spread": facts["spread"]},
        "events": {run.path: run.events._asdict() for run in runs},
        "runs": {run.path: {"config": run.config, "data": run.data} for run in runs},
        "notes": facts["notes"],
    }
    return json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no NaN


def write(runs: list[Run], folder: Path, n_samples: int) -> str:
    """Write the four files; what the terminal shows of them."""
    facts = gather(runs, n_samples)
    found = json.dumps(summary(facts), indent=2)
    page = template("report.html").render(facts, pictures=curves.as_svg(runs))
    criteria_rows = criteria_table(facts["judged"])
    in_short = table(criteria_rows.cells(), left=criteria_rows.left)
    said = "\n".join([*facts["headlines"], "", in_short])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.html", page)
        write_atomically(folder / "report.md", template("report.md").render(facts))
        write_atomically(folder / "report.json", found)
        curves.draw(runs, folder / "curves.png")
        for number, run in enumerate(runs, 1):
            if labels := by_label(run):
                curves.draw_labels(labels, folder / labels_file(number))
    except OSError as error:
        terminal.say(said)
        raise UserError(f"cannot write the report: {error}; use another --output_dir") from error
    return f"{said}\n\nwritten: {folder / 'report.html'}, report.md, report.json, curves.png"
