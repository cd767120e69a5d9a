"""A control: a run of the same shape and tokens on other text, beside the run that is judged.

control.json holds what both got and the difference, the run's less the control's, with a 95%
interval that resamples what both were given: documents, questions, prompts.
"""

from collections.abc import Callable, Iterator
from math import log

import numpy as np
import torch

import eval_ppl
from model import GPT
from nanosynth import tokenizer
from nanosynth.data import bins
from nanosynth.inference.load import LoadedRun
from nanosynth.training.distributed import World
from verdict.runs import Run

WINDOWS = 8  # scored at once
BITS = "bits a byte"


def difference(what: str, of: str, rows: np.ndarray) -> dict:
    """`rows` (n, 3): of each unit what the run got, what the control got, and what it weighs."""
    own, other = rows.sum(axis=0)[:2] / max(rows.sum(axis=0)[2], 1)
    ends = eval_ppl.bootstrap(rows, lambda own, other, weight: (own - other) / max(weight, 1))
    figures = {"run": float(own), "control": float(other), "difference": float(own - other)}
    return {"what": what, "of": of, "n": len(rows), **figures, "interval": ends}


def bits_per_byte(
    run: Run, control: Run, load: Callable[[str], LoadedRun], dtype: torch.dtype
) -> Iterator[dict]:
    """Of both on the validation split of each, over the tokens that both were trained on."""
    of_each = (bins.Split(of.settings.get("data_dir", ""), "val") for of in (run, control))
    splits = {split.sha256: split for split in of_each}  # one, where both have the same data
    on_answers = any(of.settings.get("loss_on") == "assistant" for of in (run, control))
    sums: dict[str, list[tuple]] = {sha256: [] for sha256 in splits}
    for of in (run, control):  # one model in memory at a time
        model = load(of.path).model
        for sha256, split in splits.items():
            sums[sha256].append(_bits_and_bytes(model, split, dtype, on_answers))
    for sha256, split in splits.items():
        (own, n_bytes), (other, _) = sums[sha256]
        rows = np.stack([own, other, n_bytes], axis=1)
        yield difference(BITS, str(split.path), rows)


def _bits_and_bytes(
    model: GPT, split: bins.Split, dtype: torch.dtype, on_answers: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(documents,) each: bits that a model pays for, and bytes of text."""
    ids, mask = split.ids(0, split.n_tokens), split.mask(0, split.n_tokens)
    alone = World(rank=0, size=1, device=next(model.parameters()).device)
    how = {"stride": model.config.block_size, "batch_size": WINDOWS, "dtype": dtype}
    losses = eval_ppl.score(model, ids, alone, **how)
    document = eval_ppl.documents_of(ids)[1:]
    weights = mask[1:].astype(np.float64) if on_answers else np.ones(len(losses))
    n_bytes = tokenizer.token_bytes()[ids[1:]] * weights
    return np.bincount(document, losses * weights) / log(2), np.bincount(document, n_bytes)


def tasks(run: Run, control: Run) -> Iterator[dict]:
    """Of the tasks that both were scored on, over the same questions."""
    for task, scored in run.tasks.get("zero_shot", {}).items():
        own, other = (_scores(of, task) for of in (run, control))
        if own and len(own) == len(other):
            rows = np.stack([own, other, np.ones(len(own))], axis=1)
            yield difference(scored["metric"], task, rows)


def _scores(run: Run, task: str) -> list[float]:
    """On single questions; none of a step that tasks.json is not of."""
    found = run.items.get(task, {"step": None, "scores": []})
    return found["scores"] if found["step"] == run.tasks.get("step") else []


def prompts(run: Run, control: Run) -> Iterator[dict]:
    """Of the answers to the prompts with checks, which are everyone's: are they coherent, do they
    obey?
    """
    own, other = (_answers(of) for of in (run, control))
    for mode in ("greedy", "sampled"):
        both = [key for key in own if key in other and key[0] == mode]
        for what in ("coherent", "obeys"):
            pairs = [(own[key].get(what), other[key].get(what), 1.0) for key in both]
            if pairs and all(None not in pair for pair in pairs):
                yield difference(what, f"prompts, {mode}", np.array(pairs, dtype=np.float64))


def _answers(run: Run) -> dict[tuple, dict]:
    """The first answer to each prompt with a check, by mode and prompt."""
    firsts = (s for s in run.samples if s.get("set") == "prompts" and not s.get("sample"))
    return {(sample.get("mode"), sample["prompt"]): sample for sample in firsts}


def unlike(run: Run, control: Run) -> list[str]:
    """In what the two differ beside their text."""
    own, other = (
        of.meta.get("identity", {}).get("model", {})
        | {"tokens": of.train[-1]["tokens"] if of.train else None}
        for of in (run, control)
    )
    return [
        f"{name} {own[name]} and {other.get(name)}" for name in own if own[name] != other.get(name)
    ]


def signed(difference: float) -> str:
    return f"{difference:+.3g}"


def sentence(found: dict) -> str:
    """Which differences of control.json are larger than their interval."""
    larger = [
        f"{d['what']} of {d['of']} ({signed(d['difference'])})"
        for d in found["differences"]
        if min(d["interval"], default=0) > 0 or max(d["interval"], default=0) < 0
    ]
    said = f"Larger than their interval, of {len(found['differences'])} differences to "
    said += f"{found['control']}: {', '.join(larger) or 'none'}."
    return said + (
        f" The two are unlike in {'; '.join(found['unlike'])}." if found["unlike"] else ""
    )
