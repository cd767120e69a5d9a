"""The criteria of the experiment: what each asks, how it is measured, and whether a run meets it.

Fixed before the runs. A figure decides by itself; its interval stands beside it.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from nanosynth.training.optim import SpikeGuard
from verdict import quality
from verdict.events import MAX_OVERFLOWS, MAX_RISE, SPIKE_SIGMAS
from verdict.runs import Run, numbers

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"
SECOND_SEED = "needs a second seed"
MAX_PERPLEXITY = 20.0
MIN_COHERENT = 0.9
MAX_SPREAD = 0.05
GPU_HOURS = 1.0  # the budget of one run

THRESHOLDS = {
    "perplexity": f"< {MAX_PERPLEXITY:g}",
    "coherence": f">= {MIN_COHERENT:g}",
    "stability": "no NaN, no spike",
    "reproducibility": f"spread <= {MAX_SPREAD:g}",
}
SCALES = {  # of a picture of a figure: its ends, and the threshold in between
    "perplexity": (0.0, 2 * MAX_PERPLEXITY, MAX_PERPLEXITY),
    "coherence": (0.0, 1.0, MIN_COHERENT),
    "reproducibility": (0.0, 2 * MAX_SPREAD, MAX_SPREAD),
}
HOW = {
    "perplexity": "exp of the mean loss over the tokens of the validation split, each scored once "
    "by the best checkpoint; the interval resamples whole documents. Below "
    f"{MAX_PERPLEXITY:g} passes. All tokens count; where training was on the assistant's tokens "
    "alone, those do, and the verdict says so.",
    "coherence": "share of held-out validation prompts whose sampled answer is coherent; "
    f"{MIN_COHERENT:.0%} or more passes. {quality.RULE} The plain share decides. Beside it stand "
    "the share of the reference answers, which is the ceiling of the rule itself on these prompts, "
    "and the one relative to the other, whose interval resamples prompts. Part 5 is the model's "
    "own view; how often a fixed judge disagrees is said: word frequencies of the training split, "
    "mixed with the prompt's words, over the answers that it can tell anything of.",
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


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One criterion on one run (reproducibility: on the seeds of a recipe)."""

    criterion: str
    runs: list[str]
    verdict: str = NOT_MEASURED
    figure: float | None = None
    interval: list[float] | None = None
    beside: dict[str, float] = field(default_factory=dict)  # what else stands on its scale
    remark: str = ""  # what the figure rests on, or why there is none
    command: str = ""  # what would measure it, where it is not measured

    @property
    def is_one_seed(self) -> bool:
        """Whether its question, how well seeds agree, is not asked yet."""
        return self.criterion == "reproducibility" and len(self.runs) == 1

    @property
    def in_words(self) -> str:
        return SECOND_SEED if self.is_one_seed else self.verdict


def judge(recipe: list[Run]) -> list[Judgement]:
    """Three criteria on each run of a recipe, and how well its seeds agree."""
    by_run = {run.path: [perplexity(run), coherence(run), stability(run)] for run in recipe}
    return [*(j for judged in by_run.values() for j in judged), reproducibility(recipe, by_run)]


def verdict(passes: bool) -> str:
    return PASS if passes else FAIL


def perplexity(run: Run) -> Judgement:
    judged = partial(Judgement, criterion="perplexity", runs=[run.path])
    measure = f"python -m verdict --run={run.path}"
    if not run.perplexity:
        return judged(remark="no eval_ppl.json, or it is left out", command=measure)
    if run.data and run.perplexity["data_sha256"] != run.data["files"]["val.bin"]["sha256"]:
        remark = f"eval_ppl.json is of other data, {run.perplexity['data']}"
        return judged(remark=remark, command=measure)
    scored = trained_tokens(run)
    remark = f"over {scored['tokens']:,} tokens, {scored['bits_per_byte']:.4f} bits a byte"
    if math.isnan(scored["perplexity"]):
        remark = f"no finite figure {remark}: it diverged, to a loss of {scored.get('loss')} nats"
        return judged(verdict=FAIL, remark=remark)
    if run.targets == "assistant":
        every = run.perplexity["all"]
        remark = f"trained on the assistant's tokens alone: {remark}; over all {every['tokens']:,} "
        remark += f"tokens {every['perplexity']:,.3f}"
    elif answers := run.perplexity.get("assistant"):
        remark += f"; over the assistant's alone {answers['perplexity']:,.3f}"
    return judged(
        verdict=verdict(scored["perplexity"] < MAX_PERPLEXITY),
        figure=scored["perplexity"],
        interval=scored["perplexity_95"],
        remark=remark,
    )


def coherence(run: Run) -> Judgement:
    judged = partial(Judgement, criterion="coherence", runs=[run.path])
    modes = run.tasks.get("generation", {}).get("validation", {})
    sampled = modes.get("sampled")
    if not sampled or not sampled["coherent"]["n"]:
        remark = "no sampled answers to validation prompts in tasks.json"
        return judged(remark=remark, command=f"python -m verdict --run={run.path}")
    found = sampled["coherent"]
    remark, beside = f"{found['passed']:,} of {found['n']:,} answers", {}
    if reference := modes.get("reference"):
        beside["reference answers"] = reference["coherent"]["share"]
        remark += f"; of the reference answers {beside['reference answers']:.1%}"
    if relative := sampled.get("coherent_of_references"):
        ends = " to ".join(f"{end:.1%}" for end in relative["interval"])
        remark += f", relative to which {relative['share']:.1%} ({ends})"
    if disagreed := sampled.get("judges_disagree"):
        remark += f"; of {disagreed['n']:,} answers the fixed judge saw part 5 differently in "
        remark += f"{disagreed['share']:.1%}"
    if run.tasks.get("rule", quality.RULE) != quality.RULE:
        remark += f", by another rule: {run.tasks['rule']}"
    return judged(
        verdict=verdict(found["share"] >= MIN_COHERENT),
        figure=found["share"],
        interval=found["interval"],
        beside=beside,
        remark=remark,
    )


def stability(run: Run) -> Judgement:
    judged = partial(Judgement, criterion="stability", runs=[run.path])
    n_bad = len({*run.events.not_finite, *run.events.spikes})
    listed = [f"{kind}: {numbers(at) or 'none'}" for kind, at in run.events._asdict().items()]
    remark = f"{len(run.train):,} steps; {'; '.join(listed)}".replace("_", " ")
    steps, wanted = [record["step"] for record in run.train], run.config.get("max_steps") or 0
    is_whole = len(steps) == wanted and steps == list(range(len(steps)))
    if not n_bad and (not is_whole or wanted <= SpikeGuard.WINDOW):
        said = f"all {wanted:,}" if wanted else "all, how many is not known"
        remark += f"; wanted {said}, and more than the {SpikeGuard.WINDOW} of a spike's window"
        # The same steps once more would be as few.
        return judged(remark=remark, command="" if is_whole and steps else train_command(run))
    return judged(verdict=verdict(not n_bad), figure=n_bad, remark=remark)


def reproducibility(seeds: list[Run], by_run: dict[str, list[Judgement]]) -> Judgement:
    judged = partial(Judgement, criterion="reproducibility", runs=[run.path for run in seeds])
    if len(seeds) < 2:
        seed, path = seeds[0].settings.get("seed", 42) + 1, seeds[0].path
        command = f"{train_command(seeds[0])} --seed={seed} --out_dir={path}-seed{seed}"
        return judged(remark="one seed: give a --run for each of several", command=command)
    for run in seeds:
        if not run.finished or by_run[run.path][0].verdict == NOT_MEASURED:
            return judged(remark=f"first {run.path} must be finished and its perplexity measured")
    values = [trained_tokens(run)["perplexity"] for run in seeds]
    spread = (max(values) - min(values)) / fmean(values)
    agree = len({tuple(j.verdict for j in by_run[run.path]) for run in seeds}) == 1
    remark = f"over {len(seeds)} seeds, perplexity {min(values):,.3f} to {max(values):,.3f}"
    remark += "" if agree else "; the seeds differ in a verdict"
    return judged(verdict=verdict(spread <= MAX_SPREAD and agree), figure=spread, remark=remark)


def trained_tokens(run: Run) -> dict:
    """eval_ppl.json's figures over the tokens that training had for targets."""
    return run.perplexity.get(run.targets, run.perplexity["all"])


def recipes(runs: list[Run]) -> list[list[Run]]:
    """The runs that differ in seed alone, together. One with the seed of another, or none that is
    known, is by itself: counted twice, a seed would make the spread look smaller.
    """
    groups: dict[str, list[Run]] = {}
    free = ("seed", "out_dir", "wandb_run_name")
    for run in runs:
        fixed = [item for item in sorted(run.settings.items()) if item[0] not in free]
        data = run.meta.get("identity", {}).get("data_sha256")
        key = str((fixed, run.config.get("dtype"), run.config.get("max_steps"), data))
        seeds = [None, *(other.settings["seed"] for other in groups.get(key, ()))]
        if run.settings.get("seed") in seeds:
            run.notes.append(f"{run.path}: its seed is unknown or another's: it is in no spread")
            key = run.path
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def train_command(run: Run) -> str:
    """How the run was last started; torchrun's own flags are not recorded."""
    last = [{}, *run.config.get("starts", ())][-1]
    n = last.get("world_size", 1)
    launch = "python" if n == 1 else f"torchrun --standalone --nproc_per_node={n}"
    return f"{launch} {last.get('command', 'train.py config/NAME.py')}"
