"""What a set of generated answers is like: the coherence rule's parts, diversity, intervals.

Works on texts and token ids alone. The rule is stated once, in RULE, for every report.
"""

import codecs
import math
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

import eval_ppl
from nanosynth import tokenizer

REPEATED_SHARE = 0.5  # of 4-grams, above which an answer loops
TAIL_TOKENS, LONGEST_PERIOD = 64, 16  # a tail of this length, repeating with at most this period
SHORTEST_LOOP = 16  # tokens; in less, a repetition is no loop yet
CACHE_SHARE = 0.1  # of the fixed judge: the prompt's share of the mixture
READ_TOKENS = 1 << 20

RULE = (
    "An answer is coherent when it (1) ends: gives the end mark within the limit by itself; (2) is "
    "not empty: has a letter or digit; (3) is valid text: UTF-8 without control characters or chat "
    f"marks; (4) does not loop: of {SHORTEST_LOOP} tokens or more, at most {REPEATED_SHARE:.0%} "
    f"of its 4-grams occurred earlier in it, and its last {TAIL_TOKENS} tokens (or all, if fewer) "
    f"do not repeat with a period of {LONGEST_PERIOD} tokens or less, four times or more; (5) is "
    "about its prompt: the model finds it likelier, per token, after its own prompt than after "
    "another prompt of the set, which one being fixed (answers unrelated to any prompt pass this "
    "part half of the time). All five must hold."
)
PARTS = ("ends", "not_empty", "valid_text", "no_loop", "about_prompt")


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """The share of n-grams that occurred earlier in `ids`; 0 where there is none."""
    found = ngrams(ids, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def tail_period(ids: Sequence[int]) -> int | None:
    """The period with which the tail repeats four times or more; None where it does not.

    >>> tail_period([7, 8, 9] + [1, 2] * 32)
    2
    """
    tail = list(ids[-TAIL_TOKENS:])
    for period in range(1, min(LONGEST_PERIOD, len(tail) // 4) + 1):
        if tail[period:] == tail[:-period]:
            return period
    return None


def loops(ids: Sequence[int]) -> bool:
    if len(ids) < SHORTEST_LOOP:
        return False
    return repeated_share(ids) > REPEATED_SHARE or tail_period(ids) is not None


def valid_text(ids: Sequence[int], ended: bool) -> bool:
    """UTF-8 without control characters or special ids; an answer that was cut may end torn."""
    if any(id >= tokenizer.END_OF_TEXT for id in ids):
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(b"".join(tokenizer.token_text(id) for id in ids), final=ended)
    except UnicodeDecodeError:
        return False
    return not any(
        char == "\ufffd" or (unicodedata.category(char) == "Cc" and char not in "\n\t\r")
        for char in text
    )


def parts(ids: Sequence[int], *, ended: bool, about_prompt: bool) -> dict[str, bool]:
    """The five parts of RULE for the ids of an answer, its end mark left out."""
    return {
        "ends": ended,
        "not_empty": any(char.isalnum() for char in tokenizer.decode(ids)),
        "valid_text": valid_text(ids, ended),
        "no_loop": not loops(ids),
        "about_prompt": about_prompt,
    }


class FixedJudge:
    """Tells which of two prompts an answer is about, without a network: by a unigram model of the
    training split, mixed with the prompt's own words (a cache model, Kuhn and De Mori 1990).

    A token's case and the spaces around it don't count, nor do tokens of spaces alone.
    """

    def __init__(self, read: Callable[[int, int], np.ndarray], n_tokens: int):
        """`read(start, count)` gives the ids of the split, of `n_tokens`."""
        counts = np.ones(tokenizer.N_IDS)
        for start in range(0, n_tokens, READ_TOKENS):
            ids = read(start, min(READ_TOKENS, n_tokens - start))
            counts += np.bincount(ids, minlength=len(counts))
        numbers: dict[bytes, int] = {b"": 0}
        texts = (tokenizer.token_text(id).strip().lower() for id in range(len(counts)))
        self._word = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        self._share = np.bincount(self._word, weights=counts)
        self._share /= self._share.sum()

    def prefers(self, answer: list[int], prompt: list[int], other: list[int]) -> bool | None:
        """Whether it finds the answer likelier after the prompt than after the other; None where
        the answer tells nothing, as when it shares no word with either.
        """
        words = self._words(answer)
        own, its = (self._log_likelihood(words, self._words(ids)) for ids in (prompt, other))
        return None if own == its else own > its

    def _words(self, ids: list[int]) -> np.ndarray:
        words = self._word[ids]
        return words[words > 0]

    def _log_likelihood(self, words: np.ndarray, prompt: np.ndarray) -> float:
        in_prompt = np.bincount(prompt, minlength=len(self._share)) / max(len(prompt), 1)
        mixed = (1 - CACHE_SHARE) * self._share[words] + CACHE_SHARE * in_prompt[words]
        return float(np.log(mixed).sum())


def relative(passes: Sequence[bool], references: Sequence[bool]) -> dict:
    """{'share', 'interval'} of how many pass for each reference to the same prompts that does."""
    pairs = list(zip(passes, references, strict=True))
    interval = eval_ppl.bootstrap(pairs, lambda own, theirs: own / max(theirs, 1))
    return {"share": sum(passes) / sum(references), "interval": interval}


def wilson(passed: int, n: int) -> list[float]:
    """95% interval of a share by Wilson's score (Wilson 1927); [0, 1] where n is 0."""
    if not n:
        return [0.0, 1.0]
    z = 1.959963984540054
    share = passed / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding aside, the ends are exact where none or all passed.
    return [middle - half if passed else 0.0, middle + half if passed < n else 1.0]


def share(passes: Sequence[bool]) -> dict:
    """{'passed', 'n', 'share', 'interval'}."""
    passed, n = sum(passes), len(passes)
    interval = wilson(passed, n)
    return {"passed": passed, "n": n, "share": passed / n if n else 0.0, "interval": interval}


def n_ngrams(answers: Sequence[Sequence[int]], n: int) -> int:
    return sum(max(0, len(ids) - n + 1) for ids in answers)


def distinct(answers: Sequence[Sequence[int]], n: int, count: int) -> float:
    """distinct-n (Li et al. 2016) over the first `count` n-grams of all answers.

    The share falls as more n-grams are counted: only figures of one `count` can be compared.
    """
    first = list(islice((gram for ids in answers for gram in ngrams(ids, n)), count))
    return len(set(first)) / len(first) if first else 0.0


def compression_ratio(data: bytes) -> float:
    """Size before over size after zlib; higher is more repetitive. It grows with the size."""
    return len(data) / len(zlib.compress(data, 9)) if data else 0.0


def self_bleu(samples_of_prompts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU, 0 to 1, of each sample against the others of its prompt (Zhu et al. 2018).

    sacrebleu's sentence BLEU-4: 13a tokens, exponential smoothing, and no orders longer than the
    sample; 1 is the same text each time. Raises ImportError without sacrebleu.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True, smooth_method="exp")
    scores = []
    for samples in samples_of_prompts:
        for place, sample in enumerate(samples):
            others = [*samples[:place], *samples[place + 1 :]]
            same = sample in others  # an empty sample has no BLEU, but may repeat another
            scores.append(1.0 if same else bleu.sentence_score(sample, others).score / 100)
    return sum(scores) / len(scores)
