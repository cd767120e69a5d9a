"""The figures of a run by name: what stands side by side in a report and is spread over seeds."""

from collections.abc import Iterator
from math import exp, log2
from statistics import fmean, linear_regression

from nanosynth.schema import KINDS
from nanosynth.terminal import one_line
from verdict.runs import Run

MOST_NATS = 700  # beyond, a perplexity is no number, or 0
GAP_STEPS = 128  # training steps whose mean loss stands beside a validation loss


def timing(run: Run) -> dict[str, float]:
    """Speed and hours, added up step by step, so that pauses don't count; but device-hours as the
    run itself counted them, where it did.
    """
    timed = [(r, run.tokens_per_step / r["tokens_per_second"]) for r in run.train]
    train = sum(seconds for _, seconds in timed)
    if not train:
        return {}
    mfu = sum(seconds * (record["mfu"] or 0) for record, seconds in timed) / train
    named = {"tokens a second": len(timed) * run.tokens_per_step / train}
    named |= {"hours": 0.0, "device-hours": 0.0} | ({"MFU": mfu} if mfu else {})
    for record, seconds in [*timed, *((r, r["seconds"]) for r in run.val)]:
        # A resumed run may have had another number of devices from a step on.
        starts = [s for s in run.config.get("starts", ()) if s["first_step"] <= record["step"]]
        n_devices = (starts[-1] if starts else run.config).get("world_size", 1)
        named["hours"] += seconds / 3600
        named["device-hours"] += seconds / 3600 * n_devices
    if run.device_hours is not None:
        named["device-hours"] = run.device_hours
    return named


def gap(run: Run) -> float | None:
    """The last validation loss less the mean of the GAP_STEPS accepted training losses before."""
    evaluated = [record for record in run.val if record["loss"] is not None]
    end = evaluated[-1]["step"] if evaluated else 0
    accepted = [r for r in run.train if r["loss"] is not None and not r["skipped"]]
    before = [record["loss"] for record in accepted if record["step"] < end][-GAP_STEPS:]
    return evaluated[-1]["loss"] - fmean(before) if before else None


def loss_at(run: Run) -> dict[int, float]:
    """Validation loss by tokens seen."""
    return {r["step"] * run.tokens_per_step: r["loss"] for r in run.val if r["loss"] is not None}


def fall(run: Run) -> float | None:
    """Nats that the validation loss falls a doubling of tokens, by least squares over the
    evaluations from half of the tokens on; what the schedule's decay does is part of it.
    """
    losses = loss_at(run)
    late = {log2(t): loss for t, loss in losses.items() if 2 * t >= max(losses) and t}
    return -linear_regression([*late], [*late.values()]).slope if len(late) > 1 else None


def figures(run: Run) -> dict[str, float]:
    """Every figure that the run has, by name: what stands side by side and is spread over seeds."""
    losses, exact = loss_at(run), [s["exact"] for s in run.samples if "exact" in s]
    named = {"parameters": run.config.get("parameters"), "gap to training loss": gap(run)}
    named["validation loss, fall a doubling of tokens"] = fall(run)
    if run.train:
        named |= {"steps": run.steps, "tokens seen": run.train[-1]["tokens"]} | timing(run)
    if losses:
        named["validation loss, lowest"] = min(losses.values())
        named["validation loss, last"] = losses[max(losses)]
    if exact:
        named["answers exactly right"] = fmean(exact)
    first = dict.fromkeys((run.targets, "all", "assistant"))
    scored = {f"{name} tokens": run.perplexity.get(name, {}) for name in first}
    for of, tree in {**scored, **answers(run)}.items():
        named |= {f"{of}: {name}": value for name, value in leaves(tree)}
    for task, result in run.tasks.get("zero_shot", {}).items():
        named[f"{task}: {result['metric']}"] = result["score"]
    return {name: value for name, value in named.items() if KINDS["number"](value)}


def answers(run: Run) -> dict[str, dict]:
    """What tasks.json has of answers, by 'validation, sampled' and the like."""
    sets = run.tasks.get("generation", {})
    return {f"{name}, {mode}": sets[name][mode] for name in sets for mode in sets[name]}


def by_position(run: Run) -> list[tuple[str, float, int]]:
    """(tokens of context, perplexity, tokens scored) of each stretch of the window."""
    return [
        (
            " to ".join(f"{n:,}" for n in dict.fromkeys(part["before"])),
            exp(part["loss"]),
            part["tokens"],
        )
        for part in run.perplexity.get("by_position", ())
        if abs(part["loss"]) < MOST_NATS
    ]


def by_label(run: Run) -> dict[str, list[tuple]]:
    """By 'source' and 'category', where there are several: (name, perplexity, its interval, bits a
    byte, tokens, documents) of each, over the tokens that training had for targets.
    """
    found = {}
    for use in ("source", "category"):
        rows = []
        for name, part in run.perplexity.get(f"by_{use}", {}).items():
            of = part.get(run.targets, {})
            if KINDS["number"](of.get("perplexity")):
                facts = [of[key] for key in ("perplexity", "perplexity_95", "bits_per_byte")]
                rows.append((one_line(name)[:40], *facts, of["tokens"], part["documents"]))
        if len(rows) > 1:
            found[use] = rows
    return found


HOW_MEASURED = ("n", "left_out", "distinct_counts", "compression_bytes")  # no figures


def leaves(tree: dict) -> Iterator[tuple[str, float | None]]:
    """(name, value) of each figure of eval_ppl.json or of a mode of tasks.json; of a share the
    share alone, and None where there is no number.
    """
    for key, value in tree.items():
        if key in HOW_MEASURED:
            continue
        value = value.get("share", value) if isinstance(value, dict) else value
        of_parts = value if isinstance(value, dict) else {"": value}
        for part, figure in of_parts.items():
            name = part if key == "parts" else "-".join(filter(None, (key, part)))
            yield name.replace("_", " "), figure if KINDS["number"](figure) else None
