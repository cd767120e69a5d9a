"""A model's answers to sets of prompts, and what is measured on them beside the references."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

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
        # A plain text is an answer to nothing.
        turns = [turn for turn in bins.prompts_and_answers(tokens, mask) if turn[0]]
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
    about_fixed: bool | None = None  # its prompt rather than another, says the fixed judge
    obeys: bool | None = None  # None: its prompt has no check
    copied: bool | None = None  # from the training split, where that is there

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
    rows = [prompts.ids[number] for number, _ in places]
    return [
        Answer(number=number, sample=sample, ids=ids, ended=ended)
        for (number, sample), (ids, ended) in zip(
            places, generation.answer_all(model, rows, sampling, batch_size), strict=True
        )
    ]


def add_findings(
    model: GPT, prompts: Prompts, answers: list[Answer], batch_size: int, train: bins.Split | None
) -> None:
    """Into each answer what the coherence rule, the fixed judge, its check and `train` say of it.

    The other prompt of the fifth part stands half the set further on: never the own one.
    """
    n = len(prompts.ids)
    others = [prompts.ids[(number + n // 2) % n] for number in range(n)]
    full = [answer for answer in answers if answer.ids]
    own, other = (
        likelihood.score(model, [(ids[answer.number], answer.ids) for answer in full], batch_size)
        for ids in (prompts.ids, others)
    )
    about = {id(a) for a, mine, its in zip(full, own, other, strict=True) if mine[0] > its[0]}
    for answer in answers:
        about_prompt = id(answer) in about
        answer.parts = q.parts(answer.ids, ended=answer.ended, about_prompt=about_prompt)
        if prompts.checks:
            answer.obeys = instructions.obeys(answer.text, prompts.checks[answer.number])
    if not train:
        return
    judge = q.FixedJudge(train.ids, train.n_tokens)
    copied = ngrams.copied([answer.ids for answer in answers], train.ids, train.n_tokens)
    for answer, is_copied in zip(answers, copied, strict=True):
        number, answer.copied = answer.number, is_copied
        answer.about_fixed = judge.prefers(answer.ids, prompts.ids[number], others[number])


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
    every = [answer for answers in by_mode.values() for answer in answers]
    add_findings(model, prompts, every, batch_size, train)
    firsts = {mode: [a for a in answers if not a.sample] for mode, answers in by_mode.items()}
    diversity = _diversity(firsts)
    metrics = {
        mode: {"n": len(answers), "left_out": prompts.left_out}
        | _shares(answers, firsts.get("reference", []))
        | diversity[mode]
        | {"memorised": _memorised(answers), "self_bleu": None}
        for mode, answers in firsts.items()
    }
    metrics["sampled"]["self_bleu"] = _self_bleu(by_mode["sampled"])
    return metrics, _records(prompts, by_mode)


def _shares(answers: list[Answer], references: list[Answer]) -> dict:
    obeyed = [answer.obeys for answer in answers if answer.obeys is not None]
    found = {
        "coherent": q.share([answer.coherent for answer in answers]),
        "parts": {p: sum(a.parts[p] for a in answers) / len(answers) for p in q.PARTS},
        "instructions": q.share(obeyed) if obeyed else None,
    }
    if any(answer.coherent for answer in references):
        passes = ([answer.coherent for answer in of] for of in (answers, references))
        found["coherent_of_references"] = q.relative(*passes)
    if told := [answer for answer in answers if answer.about_fixed is not None]:
        found["about_prompt_fixed_judge"] = q.share([a.about_fixed for a in told])
        disagree = [a.about_fixed != a.parts["about_prompt"] for a in told]
        found["judges_disagree"] = q.share(disagree)
    return found


def _memorised(answers: list[Answer]) -> dict | None:
    """The share of answers with a run from the training split; None where none is long enough."""
    known = [answer for answer in answers if answer.copied is not None]
    long_enough = sum(len(answer.ids) >= ngrams.RUN_TOKENS for answer in known)
    share = q.share([answer.copied for answer in known])
    return share | {"long_enough": long_enough} if long_enough else None


def common(sizes: list[int]) -> int:
    """The smallest size, those below a tenth of the largest apart: a mode that says next to nothing
    is measured on what it has and does not shorten the others.
    """
    return min(size for size in sizes if 10 * size >= max(sizes))


def _diversity(firsts: dict[str, list[Answer]]) -> dict[str, dict]:
    """distinct-n and compression of each mode, over as much as the modes have in common."""
    ids = {mode: [a.ids for a in answers] for mode, answers in firsts.items()}
    texts = {mode: "\n".join(a.text for a in answers).encode() for mode, answers in firsts.items()}
    counts = {n: common([q.n_ngrams(of_mode, n) for of_mode in ids.values()]) for n in (1, 2, 3)}
    n_bytes = common(list(map(len, texts.values())))
    return {
        mode: {
            "distinct": {str(n): q.distinct(ids[mode], n, counts[n]) for n in counts},
            "distinct_counts": {str(n): min(counts[n], q.n_ngrams(ids[mode], n)) for n in counts},
            "compression_ratio": q.compression_ratio(texts[mode][:n_bytes]),
            "compression_bytes": min(n_bytes, len(texts[mode])),
        }
        for mode in firsts
    }


def _self_bleu(sampled: list[Answer]) -> float | None:
    """Of the prompts that have several samples; None without sacrebleu."""
    if not importlib.util.find_spec("sacrebleu"):
        return None
    groups: dict[int, list[str]] = {}
    for answer in sampled:
        groups.setdefault(answer.number, []).append(answer.text)
    return q.self_bleu([texts for texts in groups.values() if len(texts) > 1])


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
            "about_prompt_fixed_judge": answer.about_fixed,
            **({"obeys": answer.obeys} if prompts.checks else {}),
        }
        for mode, answers in by_mode.items()
        for answer in answers
    ]
