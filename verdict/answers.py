"""A model's answers to sets of prompts, and what is measured on them beside the references."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from model import GPT
from nanosynth import tokenizer
from nanosynth.data import bins, ngrams
from nanosynth.inference import generation, likelihood
from nanosynth.inference.generation import Sampling
from verdict import instructions
from verdict import quality as q

BLEU_PROMPTS = 32  # the first so many of a set get several samples; the others one


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One set of prompts: their ids, and what stands beside each of them."""

    name: str
    ids: list[list[int]]
    references: list[list[int]] | None = None  # answers, without their end mark
    checks: list[dict] | None = None
    left_out: int = 0  # prompts that do not fit


def validation_prompts(
    split: bins.Split, num_prompts: int, *, block_size: int, sampling: Sampling
) -> Prompts:
    """The first `num_prompts` (0: all) of a split whose prompt and reference answer fit.

    A conversation gives one of its turns, so that no two prompts hang together: the first gives
    its first, the second its second, and so on, round and round.
    """
    room = sampling.room(block_size)
    limit = block_size - room
    ids, references, left_out = [], [], 0
    for number, (tokens, mask) in enumerate(split.documents()):
        turns = bins.prompts_and_answers(tokens, mask)
        if not turns:
            continue
        prompt, answer = turns[number % len(turns)]
        if len(prompt) > room or len(answer) > limit:
            left_out += 1
            continue
        ids.append(prompt)
        references.append(answer[:-1])
        if len(ids) == num_prompts:
            break
    return Prompts(name="validation", ids=ids, references=references, left_out=left_out)


def checked_prompts(path: Path, *, block_size: int, sampling: Sampling) -> Prompts:
    """The prompts of a file that fit, with their checks."""
    room = sampling.room(block_size)
    rows = instructions.read_prompts(path)
    encoded = [(tokenizer.prompt_ids([("user", row["prompt"])]), row["check"]) for row in rows]
    fitting = [(ids, check) for ids, check in encoded if len(ids) <= room]
    return Prompts(
        name="prompts",
        ids=[ids for ids, _ in fitting],
        checks=[check for _, check in fitting],
        left_out=len(encoded) - len(fitting),
    )


@dataclass(kw_only=True)
class Answer:
    """One answer to the prompt of a number; `ids` without the end mark."""

    number: int
    sample: int
    ids: list[int]
    ended: bool
    parts: dict[str, bool] | None = None

    @property
    def text(self) -> str:
        return tokenizer.decode(self.ids)

    @property
    def coherent(self) -> bool:
        return all(self.parts.values())


def answer_all(
    model: GPT, prompts: Prompts, n_samples: int, batch_size: int, sampling: Sampling
) -> list[Answer]:
    """An answer to each prompt, `n_samples` to each of the first BLEU_PROMPTS."""
    places = [
        (number, sample)
        for number in range(len(prompts.ids))
        for sample in range(n_samples if number < BLEU_PROMPTS else 1)
    ]
    found: list[Answer | None] = [None] * len(places)
    order = sorted(range(len(places)), key=lambda place: len(prompts.ids[places[place][0]]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, unit="batch", disable=None, desc=f"{prompts.name}: generate"):
        batch = order[start : start + batch_size]
        batch_prompts = [prompts.ids[places[place][0]] for place in batch]
        for place, ids in zip(
            batch, generation.generate(model, batch_prompts, batch, sampling), strict=True
        ):
            number, sample = places[place]
            ended = ids[-1] in tokenizer.STOP_IDS
            ids = ids[:-1] if ended else ids
            found[place] = Answer(number=number, sample=sample, ids=ids, ended=ended)
    return found


def add_parts(model: GPT, prompts: Prompts, answers: list[Answer], batch_size: int) -> None:
    """The parts of the coherence rule, into each answer.

    The other prompt of the fifth part stands half the set further on: never the own one.
    """
    n = len(prompts.ids)
    full = [answer for answer in answers if answer.ids]
    scores = [
        likelihood.score(
            model, [(prompts.ids[(a.number + shift) % n], a.ids) for a in full], batch_size
        )
        for shift in (0, n // 2)
    ]
    about = {
        id(answer): own > other for answer, (own, _), (other, _) in zip(full, *scores, strict=True)
    }
    for answer in answers:
        answer.parts = q.parts(
            answer.ids, ended=answer.ended, about_prompt=about.get(id(answer), False)
        )


def measure(
    model: GPT,
    prompts: Prompts,
    *,
    num_samples: int,
    batch_size: int,
    train: bins.Split | None,
    sampling: Sampling,
) -> tuple[dict[str, dict], list[dict]]:
    """(metrics by mode, records for a file) of greedy and sampled answers and the references.

    The shares are of the first sample of each prompt, so that all n are independent.
    """
    greedy = replace(sampling, temperature=0.0)
    by_mode = {
        "greedy": answer_all(model, prompts, 1, batch_size, greedy),
        "sampled": answer_all(model, prompts, num_samples, batch_size, sampling),
    }
    if prompts.references:
        by_mode["reference"] = [
            Answer(number=number, sample=0, ids=ids, ended=True)
            for number, ids in enumerate(prompts.references)
        ]
    for answers in by_mode.values():
        add_parts(model, prompts, answers, batch_size)
    firsts = {mode: [a for a in found if not a.sample] for mode, found in by_mode.items()}
    metrics = {mode: _shares(prompts, answers) for mode, answers in firsts.items()}
    for mode, figures in _diversity(firsts).items():
        metrics[mode] |= figures
    if importlib.util.find_spec("sacrebleu"):
        groups: list[list[str]] = [[] for _ in prompts.ids]
        for answer in by_mode["sampled"]:
            groups[answer.number].append(answer.text)
        metrics["sampled"]["self_bleu"] = q.self_bleu([g for g in groups if len(g) > 1])
    for mode, figures in (_memorised(firsts, train) if train else {}).items():
        metrics[mode]["memorised"] = figures
    return metrics, _records(prompts, by_mode)


def _shares(prompts: Prompts, answers: list[Answer]) -> dict:
    n = len(answers)
    parts = {part: sum(a.parts[part] for a in answers) / n for part in q.PARTS}
    obeyed = None
    if prompts.checks:
        obeyed = [instructions.obeys(a.text, prompts.checks[a.number]) for a in answers]
    return {
        "n": n,
        "left_out": prompts.left_out,
        "coherent": q.share([a.coherent for a in answers]),
        "parts": parts,
        "instructions": q.share(obeyed) if obeyed is not None else None,
    }


def common(sizes: list[int]) -> int:
    """The smallest size, those below a tenth of the largest apart: a mode that says next to nothing
    is measured on what it has and does not shorten the others.
    """
    return min(size for size in sizes if 10 * size >= max(sizes))


def _diversity(firsts: dict[str, list[Answer]]) -> dict[str, dict]:
    """distinct-n and compression over what the modes have in common; the rest is still None."""
    ids = {mode: [a.ids for a in answers] for mode, answers in firsts.items()}
    texts = {mode: [a.text for a in answers] for mode, answers in firsts.items()}
    counts = {n: common([q.n_ngrams(found, n) for found in ids.values()]) for n in (1, 2, 3)}
    n_bytes = common([len(q.joined(found)) for found in texts.values()])
    return {
        mode: {
            "distinct": {str(n): q.distinct(ids[mode], n, counts[n]) for n in counts},
            "distinct_counts": {str(n): min(counts[n], q.n_ngrams(ids[mode], n)) for n in counts},
            "compression_ratio": q.compression_ratio(texts[mode], n_bytes),
            "compression_bytes": min(n_bytes, len(q.joined(texts[mode]))),
            "self_bleu": None,
            "memorised": None,
        }
        for mode in firsts
    }


def _memorised(firsts: dict[str, list[Answer]], train: bins.Split) -> dict[str, dict | None]:
    """The share of answers with a run from `train`; None where no answer is long enough."""
    every = [answer.ids for answers in firsts.values() for answer in answers]
    copied = iter(ngrams.copied(every, train.ids, train.n_tokens))
    figures: dict[str, dict | None] = {}
    for mode, answers in firsts.items():
        share = q.share([next(copied) for _ in answers])
        long_enough = sum(len(answer.ids) >= ngrams.RUN_TOKENS for answer in answers)
        figures[mode] = share | {"long_enough": long_enough} if long_enough else None
    return figures


def _records(prompts: Prompts, by_mode: dict[str, list[Answer]]) -> list[dict]:
    return [
        {
            "set": prompts.name,
            "mode": mode,
            "prompt": tokenizer.decode(prompts.ids[answer.number]),
            "sample": answer.sample,
            "text": answer.text,
            "finish": "stop" if answer.ended else "length",
            "tokens": len(answer.ids) + answer.ended,
            "coherent": answer.coherent,
            **answer.parts,
        }
        for mode, answers in by_mode.items()
        for answer in answers
    ]
