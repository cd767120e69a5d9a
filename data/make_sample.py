"""Writes the demo's data set: short instruction-response conversations, generated from a seed.

Usage:
    python data/make_sample.py --to=data/sample.jsonl
    python prepare.py --source=data/sample.jsonl --data_dir=data/demo

It has OpenHermes-2.5's schema, nine kinds of task, and answers that follow exactly from the
prompt, so that a model can be scored by comparing strings. Most prompts hold words, names or
numbers drawn for them alone: a held-out prompt can't be answered from memory. Each kind's
docstring shows one conversation, as question -> answer; next question -> answer.
"""

import json
import random
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanosynth import UserError, settings, tokenizer  # noqa: E402
from nanosynth.files import write_atomically  # noqa: E402
from nanosynth.settings import setting  # noqa: E402

SOURCE = "nanosynth-synthetic"
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}  # OpenHermes's names

# Small pools, mostly of words that are one GPT-2 token each: the demo's two minutes of training
# go into the tasks and not into the vocabulary.
GROUPS = {
    "an animal": "bird cat dog fish fox".split(),
    "a food": "apple bread corn egg rice".split(),
    "a tool": "brush fork hammer knife pen".split(),
    "a place": "farm forest lake river school".split(),
    "a garment": "belt boot coat hat shirt".split(),
    "a vehicle": "bike boat bus plane train".split(),
}
WORDS = [word for group in GROUPS.values() for word in group]
NAMES = "Adam Anna Carl David Frank Jack Laura Maria Paul Tom".split()
COLOURS = "red green blue yellow black white".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CAPITALS = {
    **{"France": "Paris", "England": "London", "Russia": "Moscow", "Italy": "Rome"},
    **{"Spain": "Madrid", "Germany": "Berlin", "Egypt": "Cairo", "Japan": "Tokyo"},
    **{"China": "Beijing", "Canada": "Ottawa", "Iran": "Tehran", "Iraq": "Baghdad"},
}
CITIES = list(CAPITALS.values())
OPPOSITES = (
    "hot-cold big-small up-down left-right open-closed fast-slow high-low old-new hard-soft "
    "light-dark rich-poor early-late long-short full-empty good-bad strong-weak"
)
OPPOSITE = dict(pair.split("-")[::step] for pair in OPPOSITES.split() for step in (1, -1))

Turn = tuple[str, str]  # what the user asks, what the assistant answers


class Draw:
    """Choices from a seed, all by Random.random(), whose sequence no Python version changes."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, bound: int) -> int:
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """One of low .. high, both included."""
        return low + self.below(high - low + 1)

    def one(self, options: Sequence):
        return options[self.below(len(options))]

    def some(self, options: Sequence, count: int) -> list:
        """`count` of the options, from different places, in random order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def say(self, phrasings: str, **fields) -> str:
        """One of the phrasings, which stand between bars, with its fields filled in."""
        return self.one(phrasings.split(" | ")).format(**fields)


def listed(items: Sequence) -> str:
    return " ".join(map(str, items))


def addition(draw: Draw) -> list[Turn]:
    """What is 7 plus 5? -> 12; And one more? -> 13"""
    a, b = draw.between(1, 10), draw.between(1, 10)
    name, word = draw.one(NAMES), draw.one("boat coin hat pen shirt".split())
    question = draw.say(
        "What is {a} plus {b}? | {name} asks: what is {a} plus {b}? | "
        "{name} has {a} {word}s and finds {b} more. How many is that?",
        **{"name": name, "word": word, "a": a, "b": b},
    )
    then = (("And one more?", f"{a + b + 1}"), ("And one less?", f"{a + b - 1}"))
    return [(question, f"{a + b}"), draw.one(then)]


def comparison(draw: Draw) -> list[Turn]:
    """Which is larger, 25 or 12? -> 25; And which is smaller? -> 12"""
    a, b = draw.some(range(1, 31), 2)
    ends = [("larger", f"{max(a, b)}"), ("smaller", f"{min(a, b)}")]
    (asked, answer), (other, other_answer) = draw.some(ends, 2)
    question = draw.say(
        "Which is {asked}, {a} or {b}? | {name} has {a} and {b}. Which is the {asked} number?",
        **{"name": draw.one(NAMES), "asked": asked, "a": a, "b": b},
    )
    return [(question, answer), (f"And which is {other}?", other_answer)]


def sorting(draw: Draw) -> list[Turn]:
    """Sort these numbers: 21 5 12 -> 5 12 21; Which is the largest? -> 21"""
    numbers = draw.some(range(1, 31), 3)
    question = draw.say(
        "Sort these numbers: {numbers} | Put these numbers in order: {numbers}",
        numbers=listed(numbers),
    )
    numbers.sort()
    then = draw.one(
        (("Which is the largest?", numbers[-1]), ("Which is the smallest?", numbers[0]))
    )
    return [(question, listed(numbers)), (then[0], f"{then[1]}")]


def reversal(draw: Draw) -> list[Turn]:
    """Reverse this list: fox lake hat -> hat lake fox; Which word is first now? -> hat"""
    words = draw.some(WORDS, draw.between(2, 4))
    question = draw.say(
        "Reverse this list: {words} | Say these words backwards: {words}", words=listed(words)
    )
    words.reverse()
    then = (("Which word is first now?", words[0]), ("Which word is last now?", words[-1]))
    return [(question, listed(words)), draw.one(then)]


def copying(draw: Draw) -> list[Turn]:
    """Repeat after me: Anna saw the red hat -> Anna saw the red hat; Who was it? -> Anna"""
    name, colour, word = draw.one(NAMES), draw.one(COLOURS), draw.one(WORDS)
    verb = draw.one(("saw", "likes", "wants", "found", "lost"))
    sentence = f"{name} {verb} the {colour} {word}"
    question = draw.say(
        "Repeat after me: {sentence} | Say this again: {sentence}", sentence=sentence
    )
    then = (("Who was it?", name), ("Which colour was it?", colour), ("What was it?", word))
    return [(question, sentence), draw.one(then)]


def grouping(draw: Draw) -> list[Turn]:
    """Which of these is an animal: lake fox hat -> fox; And which is a place? -> lake"""
    groups = draw.some(list(GROUPS), draw.between(2, 5))
    words = [draw.one(GROUPS[group]) for group in groups]
    asked, other = draw.some(range(len(groups)), 2)
    question = draw.say(
        "Which of these is {group}: {words} | Find {group} in this list: {words}",
        **{"group": groups[asked], "words": listed(words)},
    )
    return [(question, words[asked]), (f"And which is {groups[other]}?", words[other])]


def capital(draw: Draw) -> list[Turn]:
    """Anna flies to the capital of Japan. Where is that? -> Tokyo; And of Italy? -> Rome"""
    country, other = draw.some(list(CAPITALS), 2)
    question = draw.say(
        "{name} asks: what is the capital of {country}? | "
        "{name} flies to the capital of {country}. Where is that? | "
        "{name} lives in {country}, in the capital. Which city is it? | "
        "Tell {name} the capital of {country}",
        **{"name": draw.one(NAMES), "country": country},
    )
    return [(question, CAPITALS[country]), (f"And of {other}?", CAPITALS[other])]


def opposite(draw: Draw) -> list[Turn]:
    """What is the opposite of hot? -> cold; And of early? -> late"""
    word, other = draw.some(list(OPPOSITE), 2)
    question = draw.say(
        "{name} asks: what is the opposite of {word}? | Tell {name} the opposite of {word} | "
        "{name} says {word} but means the opposite. What is it?",
        **{"name": draw.one(NAMES), "word": word},
    )
    return [(question, OPPOSITE[word]), (f"And of {other}?", OPPOSITE[other])]


def calendar(draw: Draw) -> list[Turn]:
    """Which day comes after Monday? -> Tuesday; And the day after that? -> Wednesday"""
    name, word, today = draw.one(NAMES), draw.one(WORDS), draw.below(7)
    step = draw.one((1, -1))
    when = {1: "after", -1: "before"}[step]
    question = draw.say(
        "{name} asks: which day comes {when} {day}? | "
        "{name} buys a {word} on the day {when} {day}. Which day is it?",
        **{"name": name, "word": word, "when": when, "day": DAYS[today]},
    )
    answers = [DAYS[(today + step * days) % 7] for days in (1, 2)]
    return [(question, answers[0]), (f"And the day {when} that?", answers[1])]


KINDS: tuple[Callable[[Draw], list[Turn]], ...] = (
    *(addition, comparison, sorting, reversal, copying, grouping, capital, opposite, calendar),
)

# What a system turn asks for, and what obeying it makes of every answer.
STYLES: tuple[tuple[str, str], ...] = (
    ("Put every answer in quotation marks.", '"{}"'),
    ("Begin every answer with a dash.", "- {}"),
    ("End every answer with an exclamation mark.", "{}!"),
)

# Every conversation has so many tokens, and two fill a row of config/demo.py: none is cut in two by
# a row's end, and each begins at one of two positions. The demo learns several times as fast so.
LENGTH = 46
# What may follow the last question, to fill a conversation up: the one at N has N tokens.
MANNERS = (
    "| Please| Thank you| Please tell me| Please tell me now| Please tell me right now"
    "| Please take your time to answer| Please take your time and think first"
    "| Please take your time and think before speaking"
    "| Please take your time and think well before speaking"
    "| Please take all your time and think well before speaking"
    "| Please take all of your time and think well before speaking"
).split("|")


def conversations(count: int, seed: int = 42) -> Iterator[dict]:
    """`count` rows in OpenHermes-2.5's schema, the same bytes for the same (count, seed).

    No two rows have the same first question, and each has LENGTH tokens.
    """
    draw = Draw(seed)
    asked: set[str] = set()
    while True:
        drafts = [draft(draw) for _ in range(1000)]  # encoded in one call
        encoded = tokenizer.encode_conversations([turns for _, turns in drafts])
        for (kind, turns), (ids, _) in zip(drafts, encoded, strict=True):
            question = next(text for role, text in turns if role == "user")
            n_missing = LENGTH - len(ids)
            if question in asked or n_missing not in range(len(MANNERS)):
                continue
            asked.add(question)
            turns[-2] = ("user", turns[-2][1] + MANNERS[n_missing])
            messages = [{"from": SPEAKERS[role], "value": text} for role, text in turns]
            yield {"conversations": messages, "source": SOURCE, "category": kind}
            if len(asked) == count:
                return


def draft(draw: Draw) -> tuple[str, list[tokenizer.Turn]]:
    """The name of a kind, and a conversation of any length."""
    kind = draw.one(KINDS)
    turns = kind(draw)
    system, style = draw.one(STYLES) if draw.below(4) == 0 else ("", "{}")
    texts = [("system", system)] if system else []
    for question, answer in turns[: draw.between(1, 2)]:
        texts += [("user", question), ("assistant", style.format(answer))]
    return kind.__name__, texts


@dataclass(frozen=True, kw_only=True)
class SampleDataConfig(settings.Settings):
    """Write the demo's conversations as JSON lines, which prepare.py reads like any others."""

    to: str = setting("data/sample.jsonl", "the file, which is replaced", path=True)
    num_rows: int = setting(24_000, "conversations", at_least=1, at_most=1_000_000)
    seed: int = setting(42, "of all that is drawn", **settings.SEED)


def main(config: SampleDataConfig) -> None:
    path = Path(config.to)
    rows = conversations(config.num_rows, config.seed)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lines)
    except OSError as error:
        raise UserError(f"--to={path} cannot be written: {error}") from error
    print(f"{config.num_rows:,} conversations in {path}; to prepare them:")
    name = "demo" if path == Path(SampleDataConfig.to) else path.stem
    print(shlex.join(["python", "prepare.py", f"--source={path}", f"--data_dir=data/{name}"]))


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(SampleDataConfig))
