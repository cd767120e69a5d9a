"""The criteria of the experiment: what each asks, how it is measured, and whether a run meets it.

Fixed before the runs. A figure decides by itself; an interval that reaches over the threshold is
said beside the verdict and doesn't change it.
"""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch

from nanosynth import runs
from nanosynth.optim import SpikeGuard

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"
MAX_PERPLEXITY = 20.0
MIN_COHERENT = 0.9
SPIKE_SIGMAS = 8.0  # train.py's default; fixed here, so that a run's setting can't soften it
MAX_RISE = 0.3  # nats: a perplexity a third higher
MAX_OVERFLOWS = 3  # in a row: a loss scale up to 8 times too high
MAX_SPREAD = 0.05
GPU_HOURS = 1.0  # the budget of one run
THRESHOLDS = {
    "perplexity": f"< {MAX_PERPLEXITY:g}",
    "coherence": f">= {MIN_COHERENT:.0%}",
    "stability": "no NaN, no spike",
    "reproducibility": f"spread <= {MAX_SPREAD:.0%}",
}

HOW = {
    "perplexity": "exp of the mean loss over every token of the validation split, each scored once "
    "by the best checkpoint (eval_ppl.py); the interval resamples whole documents. Below "
    f"{MAX_PERPLEXITY:g} passes. All tokens count, also where training was on answers alone.",
    "coherence": "share of held-out validation prompts whose sampled answer passes every part of "
    f"the rule of eval_tasks.py; {MIN_COHERENT:.0%} or more passes. Rule: ",
    "stability": "counted over every step in metrics.jsonl. NaN: a loss that is not finite, or a "
    "gradient that is not while there is no loss scale above 1 to blame, or more than "
    f"{MAX_OVERFLOWS} times in a row. Spike: a loss more than {SPIKE_SIGMAS:g} standard deviations "
    f"above the mean of the last {SpikeGuard.WINDOW} accepted ones, or one that the run skipped as "
    f"a spike; or that mean more than {MAX_RISE} nats above its lowest. A skipped spike counts. "
    "A float16 overflow does not: the loss scale is found by trying, the step is skipped and the "
    f"weights stay. The first {SpikeGuard.WINDOW} steps have no window and are judged for NaN only."
    " A run passes when all its steps are there.",
    "reproducibility": "finished runs of one recipe (same settings but for seed and out_dir, same "
    "data and dtype) with two or more seeds agree on the criteria above, and their perplexities "
    f"over the tokens trained on lie within {MAX_SPREAD:.0%} of their mean, lowest to highest.",
}


class Events(NamedTuple):
    """The steps at which training went wrong, by kind."""

    not_finite: list[int]
    spikes: list[int]
    rises: list[int]  # where the running mean first stood MAX_RISE above its lowest
    overflows: list[int]  # float16's, which the loss scale explains

    @property
    def bad(self) -> list[int]:
        return sorted({*self.not_finite, *self.spikes, *self.rises})


def find_events(train: list[dict]) -> Events:
    """Replays the losses of metrics.jsonl through the guard that training itself uses."""
    guard = SpikeGuard(SPIKE_SIGMAS, torch.device("cpu"))
    found = Events([], [], [], [])
    lowest, risen, n_overflows = math.inf, False, 0
    for record in train:
        step, loss = record["step"], record["loss"]
        finite_gradient = record["grad_norm"] is not None
        loss_tensor = torch.tensor(math.nan if loss is None else float(loss))
        accepted = guard.accepts(loss_tensor)
        n_overflows = 0 if finite_gradient else n_overflows + 1
        if loss is None:
            found.not_finite.append(step)
        elif not accepted or (finite_gradient and record["skipped"]):
            found.spikes.append(step)
        elif not finite_gradient:
            is_overflow = record["loss_scale"] > 1 and n_overflows <= MAX_OVERFLOWS
            (found.overflows if is_overflow else found.not_finite).append(step)
        guard.note(loss_tensor, accepted & finite_gradient)
        if guard.n_accepted >= guard.WINDOW:
            mean = guard.losses.mean().item()
            lowest = min(lowest, mean)
            if mean > lowest + MAX_RISE and not risen:
                found.rises.append(step)
            risen = mean > lowest + MAX_RISE
    return found


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One criterion on one run (reproducibility: on the seeds of a recipe)."""

    criterion: str
    runs: list[str]
    verdict: str = NOT_MEASURED
    figure: float | None = None
    interval: list[float] | None = None
    text: str = ""  # the figure for a reader
    remark: str = ""  # what a sceptic should know, or why there is no figure
    command: str = ""  # what would measure it, where it is not measured


def perplexity(run: runs.Run) -> Judgement:
    base = {"criterion": "perplexity", "runs": [run.path]}
    missing = base | {"command": f"python eval_ppl.py --run={run.path}"}
    scored = run.perplexity
    if not scored:
        return Judgement(**missing)
    if run.data and scored["data_sha256"] != run.data["files"]["val.bin"]["sha256"]:
        return Judgement(**missing, remark=f"eval_ppl.json is of other data, {scored['data']}")
    figure, interval = scored["all"]["perplexity"], scored["all"]["perplexity_95"]
    remarks = _straddle(interval, MAX_PERPLEXITY)
    if scored["loss_on"] == "assistant":
        trained = scored.get("assistant", scored["all"])["perplexity"]
        remarks.append(
            f"trained on assistant tokens alone, where it is {trained:,.3f}; no other token was "
            "ever a target"
        )
    return Judgement(
        **base,
        verdict=PASS if figure < MAX_PERPLEXITY else FAIL,
        figure=figure,
        interval=interval,
        text=f"{figure:,.3f} ({scored['all']['tokens']:,} tokens)",
        remark="; ".join(remarks),
    )


def coherence(run: runs.Run) -> Judgement:
    base = {"criterion": "coherence", "runs": [run.path]}
    sampled = run.tasks.get("generation", {}).get("validation", {}).get("sampled")
    if not sampled or not sampled["coherent"]["n"]:
        return Judgement(**base, command=f"python eval_tasks.py --run={run.path}")
    found = sampled["coherent"]
    return Judgement(
        **base,
        verdict=PASS if found["share"] >= MIN_COHERENT else FAIL,
        figure=found["share"],
        interval=found["interval"],
        text=f"{found['share']:.1%} ({found['passed']:,} of {found['n']:,})",
        remark="; ".join(_straddle(found["interval"], MIN_COHERENT)),
    )


def _straddle(interval: list[float], threshold: float) -> list[str]:
    low, high = interval
    if not low <= threshold <= high:
        return []
    return ["the interval reaches over the threshold: another sample could turn the verdict"]


def stability(run: runs.Run, events: Events) -> Judgement:
    base = {"criterion": "stability", "runs": [run.path]}
    if run.train:
        base["text"] = (
            f"{len(events.not_finite)} NaN, {len(events.spikes)} spikes, {len(events.rises)} rises"
        )
    if events.bad:
        remark = f"at steps {numbers(events.bad)}"
        return Judgement(**base, verdict=FAIL, figure=float(len(events.bad)), remark=remark)
    wanted = run.config.get("max_steps")
    if not run.train:
        remark = "no training step in metrics.jsonl"
    elif wanted is None:
        remark = "without config.json it is not known whether these are all steps"
    elif [record["step"] for record in run.train] != list(range(wanted)):
        remark = f"{len(run.train):,} of {wanted:,} steps are in metrics.jsonl"
    elif wanted <= SpikeGuard.WINDOW:
        remark = f"{wanted} steps; the window of a spike alone takes {SpikeGuard.WINDOW}"
    else:
        return Judgement(**base, verdict=PASS, figure=0.0)
    return Judgement(**base, remark=remark, command=train_command(run))


def recipe(run: runs.Run) -> str:
    """What the seeds of one recipe have in common; a run without config.json is its own."""
    if not run.config:
        return run.path
    free = ("seed", "out_dir", "wandb_run_name")
    settings = {key: value for key, value in run.config["settings"].items() if key not in free}
    data = [meta["identity"]["data_sha256"] for meta in run.checkpoints.values()][:1]
    return str((sorted(settings.items()), run.config["dtype"], run.config["max_steps"], data))


def reproducibility(seeds: list[runs.Run], judged: dict[str, list[Judgement]]) -> Judgement:
    """Over the runs of one recipe; `judged` has the other criteria's judgements by run."""
    base = {"criterion": "reproducibility", "runs": [run.path for run in seeds]}
    n_seeds = len({run.config["settings"]["seed"] for run in seeds if run.config})
    if n_seeds < 2:
        return Judgement(**base, remark="one seed", command=_another_seed(seeds[0]))
    for run in seeds:
        measured = next(j for j in judged[run.path] if j.criterion == "perplexity")
        if not run.finished:
            remark = f"{run.path} is not finished"
            return Judgement(**base, remark=remark, command=train_command(run))
        if measured.verdict == NOT_MEASURED:
            remark = f"{run.path} has no perplexity"
            return Judgement(**base, remark=remark, command=measured.command)
    found = [trained_perplexity(run) for run in seeds]
    spread = (max(found) - min(found)) / fmean(found)
    differing = [
        f"the seeds differ in {same[0].criterion}"
        for same in zip(*(judged[run.path] for run in seeds), strict=True)
        if len({judgement.verdict for judgement in same}) > 1
    ]
    return Judgement(
        **base,
        verdict=PASS if spread <= MAX_SPREAD and not differing else FAIL,
        figure=spread,
        interval=[min(found), max(found)],
        text=f"{spread:.2%} over {n_seeds} seeds",
        remark="; ".join(differing),
    )


def trained_perplexity(run: runs.Run) -> float:
    """Over the tokens that training had for targets."""
    scored = run.perplexity
    return scored.get(scored["loss_on"], scored["all"])["perplexity"]


def _another_seed(run: runs.Run) -> str:
    seed = run.config["settings"]["seed"] + 1 if run.config else 43
    path = f"{run.path}-seed{seed}"
    return (
        f"{train_command(run)} --seed={seed} --out_dir={path} && python eval_ppl.py --run={path} "
        f"&& python report.py --run={run.path} --run={path}"
    )


def train_command(run: runs.Run) -> str:
    """How the run was last started; torchrun's own flags are not recorded."""
    started = run.config.get("starts")
    if not started:
        return "python train.py config/NAME.py"
    n = started[-1]["world_size"]
    launch = "python" if n == 1 else f"torchrun --standalone --nproc_per_node={n}"
    return f"{launch} {started[-1]['command']}"


def numbers(steps: list[int], most: int = 20) -> str:
    """The first of them, and how many more."""
    more = f" and {len(steps) - most:,} more" if len(steps) > most else ""
    return ", ".join(map(str, steps[:most])) + more
