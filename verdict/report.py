"""report.html, report.md, report.json and curves.png: the criteria, every figure, and how each was
come by.

The facts are gathered once; templates/ arranges them for a browser and as Markdown.
"""

import functools
import json
import re
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from textwrap import indent
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from nanosynth import UserError
from nanosynth.files import write_atomically
from nanosynth.table import table
from nanosynth.terminal import harmless, one_line
from verdict import control, criteria, curves, quality
from verdict.criteria import FAIL, GPU_HOURS, NOT_MEASURED, PASS, Events, Judgement
from verdict.figures import answers, by_label, by_position, figures, leaves, loss_at
from verdict.runs import Run
from verdict.schemas import KINDS

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
RULE_OF_CHOICE = (
    "The first {} answers that are coherent and that fail each part of the rule, to different "
    "prompts and in the order of the file: held-out prompts, sampled, the first sample of each, "
    "where it has several. What fails several parts stands at the first of them."
)
ABOUT_CONTROL = (
    "A difference is the run's less the control's; fewer bits are better. Its interval resamples "
    "the documents, questions or prompts that both had. One in twenty would look larger than its "
    "interval by chance alone, and another seed may move each."
)
MOST_ANSWERS = 5000  # of a run in report.html; a browser searches so many at once


class Table(NamedTuple):
    """Rows of cells, the first the head; `left` are the columns of text."""

    rows: list[list[str]]
    left: tuple[int, ...] = (0,)


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval_text(ends: list[float] | None) -> str:
    return " to ".join(map(shown, ends or ())) or "-"


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
        ends = (min(values), max(values)) if values else ()  # of a run that diverged there is none
        ends = [IN_SHORT.get(name, "").format(end) for end in ends]
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


def verdict_of(judged: Judgement) -> str:
    return SECOND_SEED if is_one_seed(judged) else judged.verdict


def criteria_table(judgements: list[Judgement]) -> Table:
    rows = [["criterion", "run", "threshold", "figure", "95% interval", "verdict"]]
    for judged in judgements:
        threshold, interval = criteria.THRESHOLDS[judged.criterion], interval_text(judged.interval)
        facts = [threshold, shown(judged.figure), interval, verdict_of(judged)]
        rows.append([judged.criterion, ", ".join(judged.runs), *facts])
    return Table(rows, left=(0, 1, 2, 5))


def figures_tables(recipes: list[list[Run]]) -> tuple[Table, dict[str, Table], dict]:
    """Every figure of every run side by side, its spread over the seeds of a recipe by their names,
    and both as values.
    """
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
    tables, spread = {}, {}
    for recipe in recipes:
        seeds = {run.path: by_run[run.path] for run in recipe if run.finished}
        if len(seeds) > 1:
            key = ", ".join(seeds)
            shared = [name for name in names if all(name in values for values in seeds.values())]
            spread[key] = {n: spread_of([values[n] for values in seeds.values()]) for n in shared}
            tables[key] = Table([["figure", "mean", "standard deviation", "lowest", "highest"]])
            for name, values in spread[key].items():
                tables[key].rows.append([name, *map(shown, values.values())])
    return Table(rows), tables, {"by_run": by_run, "spread": spread}


def spread_of(values: list[float]) -> dict[str, float]:
    mean = fmean(values)
    return {"mean": mean, "stdev": stdev(values), "lowest": min(values), "highest": max(values)}


def answers_table(run: Run) -> Table | None:
    """What was measured on answers, a column for each set of prompts and way of answering."""
    columns = answers(run)
    intervals = [interval_text(mode["coherent"]["interval"]) for mode in columns.values()]
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
    return Table(rows) if columns else None


def position_table(run: Run) -> Table | None:
    rows = [["tokens of context", "perplexity", "tokens"]]
    rows += [[before, shown(figure), f"{n:,}"] for before, figure, n in by_position(run)]
    return Table(rows) if len(rows) > 1 else None


def label_tables(run: Run) -> dict[str, Table]:
    """By 'source' and 'category': which part of the data the run has learnt."""
    tables = {}
    for use, parts in by_label(run).items():
        rows = [[use, "perplexity", "95% interval", "bits a byte", "tokens", "documents"]]
        for name, scored, documents in parts:
            cells = [shown(scored["perplexity"]), interval_text(scored["perplexity_95"])]
            cells += [shown(scored["bits_per_byte"]), f"{scored['tokens']:,}", f"{documents:,}"]
            rows.append([name, *cells])
        tables[use] = Table(rows)
    return tables


def control_table(run: Run) -> Table:
    rows = [["figure", "of", run.path, "the control", "difference", "95% interval", "n"]]
    for found in run.control.get("differences", ()):
        values = [shown(found["run"]), shown(found["control"]), control.signed(found["difference"])]
        values += [interval_text(found["interval"]), f"{found['n']:,}"]
        rows.append([found["what"], found["of"], *values])
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
        one = {"task": task, "stderr": None, "chance": None, **scored}
        half = 1.96 * one["stderr"] if KINDS["number"](one["stderr"]) else 0
        interval = [one["score"] - half, one["score"] + half]
        others = published.get(task, ())
        rings = [(other["model"], other["score"]) for other in others]
        found.append(one | {"interval": interval, "others": others, "rings": rings})
    return found


def tasks_table(run: Run) -> Table | None:
    rows = [["task", "metric", "model", "score", "standard error", "source"]]
    for scored in zero_shot(run):
        named = [scored["task"], scored["metric"]]
        own = [shown(scored["score"]), shown(scored["stderr"]), f"n = {scored['n']:,}"]
        rows.append([*named, run.path, *own])
        rows.append([*named, "chance", shown(scored["chance"]), "-", "-"])
        for other in scored["others"]:
            theirs = [other["model"], shown(other["score"]), "-", other["source"]]
            rows.append([scored["task"], other.get("metric", "-"), *theirs])
    return Table(rows, left=(0, 1, 2, 5)) if len(rows) > 1 else None


def finding(sample: dict) -> list[str]:
    """What the coherence rule says of an answer: 'coherent', or the parts that failed."""
    if "coherent" not in sample:
        return ["not judged"]
    failed = [part for part in quality.PARTS if sample.get(part) is False]
    return failed or ["coherent" if sample["coherent"] else "not coherent"]


def said(found: str) -> str:
    """A finding in words."""
    return f"failed: {found.replace('_', ' ')}" if found in quality.PARTS else found


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
    order = ["coherent", *quality.PARTS, "not coherent", "not judged"]
    return {name: list(groups[name].values()) for name in order if groups.get(name)}


def filters(samples: list[dict]) -> dict[str, list[str]]:
    """The values that the list of answers can be filtered by."""
    by = {"set": [], "mode": [], "finding": []}
    for sample in samples:
        for name in ("set", "mode"):
            by[name] += [str(sample[name])] if name in sample else []
        by["finding"] += finding(sample)
    return {name: sorted(set(values)) for name, values in by.items() if len(set(values)) > 1}


def gather(runs: list[Run], events: dict[str, Events], n_samples: int) -> dict:
    """All that the templates show."""
    recipes = criteria.recipes(runs)
    judged = [criteria.judge(recipe, events) for recipe in recipes]
    every = [judgement for judgements in judged for judgement in judgements]
    side_by_side, spread, values = figures_tables(recipes)
    return {
        "headlines": [headline(*pair) for pair in zip(judged, recipes, strict=True)],
        "judged": every,
        "criteria": criteria_table(every),
        "thresholds": criteria.THRESHOLDS,
        "scales": criteria.SCALES,
        "how": criteria.HOW,
        "notes": [note for run in runs for note in run.notes],
        "figures": side_by_side,
        "spread": spread,
        "values": values,
        "rule_of_choice": RULE_OF_CHOICE.format(n_samples),
        "runs": [
            {
                "path": run.path,
                "control": run.control,
                "compared": control.sentence(run.control) if run.control else "",
                "control_table": control_table(run),
                "position": position_table(run),
                "positions": by_position(run),
                "by_label": label_tables(run),
                "labels": by_label(run),
                "labels_file": "sources.png" if number == 1 else f"sources_{number}.png",
                "answers": answers_table(run),
                "tasks": tasks_table(run),
                "zero_shot": zero_shot(run),
                "made": made_lines(run),
                "samples_file": run.samples_file,
                "chosen": chosen_samples(run, n_samples),
                "samples": run.samples[:MOST_ANSWERS],
                "n_samples": len(run.samples),
            }
            for number, run in enumerate(runs, 1)
        ],
        "filters": filters([sample for run in runs for sample in run.samples[:MOST_ANSWERS]]),
        "about_control": ABOUT_CONTROL,
        "limits": LIMITS,
    }


@functools.cache
def templates() -> jinja2.Environment:
    """What comes into HTML is escaped."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"shown": shown, "interval": interval_text, "signed": control.signed}
    found.filters |= {"verdict": verdict_of}
    found.filters |= {"finding": finding, "said": said, "markdown": markdown_table}
    found.filters["code"] = lambda text: Markup(f"`{one_line(text).replace('`', chr(39))}`")
    found.filters["indented"] = lambda text: Markup(
        indent(harmless(text), "    ", lambda line: True)
    )
    return found


def in_markdown(value: object) -> object:
    """What a template shows of a text that may be anybody's: one line, and no HTML."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"<(?=[\w/!?])", "&lt;", one_line(value).replace("`", "'"))


def markdown_table(found: Table) -> Markup:
    rows = [list(map(in_markdown, row)) for row in found.rows]
    return Markup(table(rows, left=found.left, markdown=True))


def render(name: str, facts: dict) -> str:
    is_markdown = name.endswith(".md")
    found = templates().overlay(finalize=in_markdown) if is_markdown else templates()
    return found.get_template(name).render(facts)


def summary(facts: dict, runs: list[Run], events: dict[str, Events]) -> dict:
    """report.json, as an object."""
    thresholds = criteria.THRESHOLDS
    found = {
        "format_version": 1,
        "headlines": facts["headlines"],
        "criteria": [asdict(j) | {"threshold": thresholds[j.criterion]} for j in facts["judged"]],
        "how": criteria.HOW,
        "figures": facts["values"],
        "events": {path: found._asdict() for path, found in events.items()},
        "runs": {run.path: {"config": run.config, "data": run.data} for run in runs},
        "notes": facts["notes"],
    }
    return json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no NaN


def write(runs: list[Run], folder: Path, n_samples: int) -> str:
    """Write the four files; what the terminal shows of them."""
    events = {run.path: criteria.find_events(run.train) for run in runs}
    facts = gather(runs, events, n_samples)
    found = json.dumps(summary(facts, runs, events), indent=2)
    page = render("report.html", facts | {"pictures": curves.as_svg(runs, events)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.html", page)
        write_atomically(folder / "report.md", render("report.md", facts))
        write_atomically(folder / "report.json", found)
        curves.draw(runs, events, folder / "curves.png")
        for run in facts["runs"]:
            if run["labels"]:
                curves.draw_labels(run["labels"], folder / run["labels_file"])
    except OSError as error:
        raise UserError(f"cannot write the report: {error}; use another --output_dir") from error
    rows, left = facts["criteria"]
    written = f"written: {folder / 'report.html'}, report.md, report.json, curves.png"
    return "\n".join([*facts["headlines"], "", table(rows, left=left), "", written])
