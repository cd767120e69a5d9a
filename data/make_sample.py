"""Writes the demo's data set: short instruction-response conversations, generated from a seed.

Usage:
    python data/make_sample.py --to=data/sample.jsonl
    python prepare.py --source=data/sample.jsonl --data_dir=data/demo

It has OpenHermes-2.5's schema, many kinds of task, and answers that follow exactly from the
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

from nanosynth import UserError, settings  # noqa: E402
from nanosynth.files import write_atomically  # noqa: E402
from nanosynth.settings import setting  # noqa: E402

SOURCE = "nanosynth-synthetic"

# Small pools, mostly of words that are one GPT-2 token each: the demo's few minutes of training
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
    name, a, b = draw.one(NAMES), draw.between(1, 10), draw.between(1, 10)
    question = draw.say(
        "What is {a} plus {b}? | {name} wants to add {a} and {b}. What is the sum? | "
        "{name} has {a} coins and finds {b} more. How many coins is that? | "
        "{name} read {a} pages before lunch and {b} after it. How many is that?",
        **{"name": name, "a": a, "b": b},
    )
    return [(question, f"{a + b}"), ("And one more?", f"{a + b + 1}")]


def subtraction(draw: Draw) -> list[Turn]:
    """What is 12 minus 5? -> 7; And one less? -> 6"""
    name, b, rest = draw.one(NAMES), draw.between(1, 10), draw.between(1, 10)
    question = draw.say(
        "What is {a} minus {b}? | {name} takes {b} away from {a}. What is left? | "
        "{name} has {a} coins and loses {b}. How many coins are left? | "
        "{name} had {a} eggs and ate {b} of them. How many are left?",
        **{"name": name, "a": rest + b, "b": b},
    )
    return [(question, f"{rest}"), ("And one less?", f"{rest - 1}")]


def sequence(draw: Draw) -> list[Turn]:
    """Count from 14 to 17 -> 14 15 16 17; What comes next? -> 18"""
    first, length = draw.between(1, 26), draw.between(3, 5)
    numbers = list(range(first, first + length))
    question = draw.say(
        "Count from {a} to {b} | List the numbers from {a} to {b} | "
        "{name} counts from {a} up to {b}. What does {name} say? | "
        "{name} starts at {a} and stops at {b}. Which numbers are these?",
        **{"name": draw.one(NAMES), "a": first, "b": numbers[-1]},
    )
    return [(question, listed(numbers)), ("What comes next?", f"{numbers[-1] + 1}")]


def comparison(draw: Draw) -> list[Turn]:
    """Which is larger, 25 or 12? -> 25; And which is smaller? -> 12"""
    a, b = draw.some(range(1, 31), 2)
    larger = draw.say(
        "Which is larger, {a} or {b}? | Which number is greater: {a} or {b}? | "
        "Name the larger of {a} and {b} | Of {a} and {b}, which is the bigger number?",
        **{"a": a, "b": b},
    )
    smaller = draw.say(
        "Which is smaller, {a} or {b}? | Which number is less: {a} or {b}? | "
        "Name the smaller of {a} and {b} | Of {a} and {b}, which is the lower number?",
        **{"a": a, "b": b},
    )
    low, high = f"{min(a, b)}", f"{max(a, b)}"
    if draw.below(2):
        return [(larger, high), ("And which is smaller?", low)]
    return [(smaller, low), ("And which is larger?", high)]


def sorting(draw: Draw) -> list[Turn]:
    """Sort these numbers: 21 5 12 -> 5 12 21; Which is the largest? -> 21"""
    numbers = draw.some(range(1, 31), 3)
    question = draw.say(
        "Sort these numbers: {numbers} | Put these numbers in order: {numbers} | "
        "Arrange from low to high: {numbers} | Write in rising order: {numbers}",
        numbers=listed(numbers),
    )
    numbers.sort()
    then = draw.one(
        (("Which is the largest?", numbers[-1]), ("Which is the smallest?", numbers[0]))
    )
    return [(question, listed(numbers)), (then[0], f"{then[1]}")]


def reversal(draw: Draw) -> list[Turn]:
    """Reverse this list: fox lake hat -> hat lake fox; Which word is first now? -> hat"""
    words = draw.some(WORDS, draw.between(2, 3))
    question = draw.say(
        "Reverse this list: {words} | Write this list backwards: {words} | "
        "Turn the order around: {words} | Say these words from last to first: {words}",
        words=listed(words),
    )
    words.reverse()
    then = draw.one(
        (("Which word is first now?", words[0]), ("Which word is last now?", words[-1]))
    )
    return [(question, listed(words)), then]


def position(draw: Draw) -> list[Turn]:
    """Which word comes last: fox lake hat -> hat; And which is first? -> fox"""
    words = draw.some(WORDS, draw.between(3, 4))
    ends = [("first", words[0]), ("last", words[-1])]
    (asked, answer), (other, other_answer) = draw.some(ends, 2)
    question = draw.say(
        "Which word comes {place}: {words} | Give me the {place} of these words: {words} | "
        "What is the {place} word in this list: {words} | Name the {place} item: {words}",
        **{"place": asked, "words": listed(words)},
    )
    return [(question, answer), (f"And which is {other}?", other_answer)]


def amount(draw: Draw) -> list[Turn]:
    """How many words are in this list: fox lake hat -> 3; And with one more? -> 4"""
    words = draw.some(WORDS, draw.between(2, 6))
    question = draw.say(
        "How many words are in this list: {words} | Count these words: {words} | "
        "How long is this list: {words} | Tell me the number of words here: {words}",
        words=listed(words),
    )
    return [(question, f"{len(words)}"), ("And with one more?", f"{len(words) + 1}")]


def lookup(draw: Draw) -> list[Turn]:
    """Anna is 31, Tom is 27. How old is Tom? -> Tom is 27; And Anna? -> Anna is 31"""
    fact, question, values = draw.one(
        (
            ("{} is {}", "How old is {}? | What is the age of {}?", range(1, 31)),
            ("{} lives in {}", "Where does {} live? | Where is the home of {}?", CITIES),
            ("{} likes {}", "What does {} like? | What is the favourite colour of {}?", COLOURS),
        )
    )
    names = draw.some(NAMES, draw.between(2, 3))
    pairs = zip(names, draw.some(values, len(names)), strict=True)
    facts = [fact.format(*pair) for pair in pairs]
    asked, other = draw.some(range(len(names)), 2)
    question = draw.one(question.split(" | ")).format(names[asked])
    then = draw.one(("And {}?", "What about {}?")).format(names[other])
    return [(f"{', '.join(facts)}. {question}", facts[asked]), (then, facts[other])]


def copying(draw: Draw) -> list[Turn]:
    """Repeat after me: Anna saw the red hat -> Anna saw the red hat; Who was it? -> Anna"""
    name, colour, word = draw.one(NAMES), draw.one(COLOURS), draw.one(WORDS)
    verb = draw.one(("saw", "likes", "wants", "found", "lost"))
    sentence = f"{name} {verb} the {colour} {word}"
    question = draw.say(
        "Repeat after me: {sentence} | Say this again: {sentence} | "
        "Copy this sentence: {sentence} | Write this once more: {sentence}",
        sentence=sentence,
    )
    then = (("Who was it?", name), ("Which colour was it?", colour), ("What was it?", word))
    return [(question, sentence), draw.one(then)]


def repetition(draw: Draw) -> list[Turn]:
    """Repeat these words: fox lake hat -> fox lake hat; How many are they? -> 3"""
    words = draw.some(WORDS, draw.between(2, 4))
    question = draw.say(
        "Repeat these words: {words} | Say these words again: {words} | "
        "Copy this list: {words} | Write this list once more: {words}",
        words=listed(words),
    )
    return [(question, listed(words)), ("How many are they?", f"{len(words)}")]


def spelling(draw: Draw) -> list[Turn]:
    """How do you spell lake? -> l a k e; What is its first letter? -> l"""
    word = draw.one(WORDS)
    question = draw.say(
        "{name} asks: how do you spell {word}? | Spell the word {word} for {name} | "
        "{name} can't spell {word}. Can you? | {name} wants to write {word}. Give the letters",
        **{"name": draw.one(NAMES), "word": word},
    )
    then = (("What is its first letter?", word[0]), ("What is its last letter?", word[-1]))
    return [(question, listed(word)), draw.one(then)]


def membership(draw: Draw) -> list[Turn]:
    """Is lake in this list: fox lake hat -> Yes; And cat? -> No"""
    *words, absent, missing = draw.some(WORDS, draw.between(4, 5))
    asked = draw.one((absent, draw.one(words)))
    other = draw.one((missing, draw.one(words)))
    question = draw.say(
        "Is {word} in this list: {words} | Do you see {word} here: {words} | "
        "Is {word} one of these words: {words} | Does this list have {word}: {words}",
        **{"word": asked, "words": listed(words)},
    )
    answers = {True: "Yes", False: "No"}
    return [(question, answers[asked in words]), (f"And {other}?", answers[other in words])]


def grouping(draw: Draw) -> list[Turn]:
    """Which of these is an animal: lake fox hat -> fox; And which is a place? -> lake"""
    groups = draw.some(list(GROUPS), draw.between(2, 4))
    words = [draw.one(GROUPS[group]) for group in groups]
    asked, other = draw.some(range(len(groups)), 2)
    question = draw.say(
        "Which of these is {group}: {words} | Find {group} in this list: {words} | "
        "One of these is {group}: {words} | Pick the word for {group}: {words}",
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
        "{name} says {word} but means the opposite. What is it? | "
        "Not {word} but the opposite, says {name}. Which word is it?",
        **{"name": draw.one(NAMES), "word": word},
    )
    return [(question, OPPOSITE[word]), (f"And of {other}?", OPPOSITE[other])]


def calendar(draw: Draw) -> list[Turn]:
    """Which day comes after Monday? -> Tuesday; And the day after that? -> Wednesday"""
    name, word, today = draw.one(NAMES), draw.one(WORDS), draw.below(7)
    step = draw.one((1, -1))
    when = {1: "after", -1: "before"}[step]
    question = draw.say(
        "{name} asks: which day comes {when} {day}? | Tell {name} the day {when} {day} | "
        "{name} buys a {word} on the day {when} {day}. Which day is it? | "
        "The {word} of {name} comes the day {when} {day}. When is that?",
        **{"name": name, "word": word, "when": when, "day": DAYS[today]},
    )
    answers = [DAYS[(today + step * days) % 7] for days in (1, 2)]
    return [(question, answers[0]), (f"And the day {when} that?", answers[1])]


KINDS: tuple[Callable[[Draw], list[Turn]], ...] = (
    *(addition, subtraction, sequence, comparison, sorting, reversal, position, amount, lookup),
    *(copying, repetition, spelling, membership, grouping, capital, opposite, calendar),
)

# What a system turn asks for, and what obeying it makes of every answer.
STYLES: tuple[tuple[str, str], ...] = (
    ("You are a helpful assistant.", "{}"),
    ("Put every answer in quotation marks.", '"{}"'),
    ("Begin every answer with a dash.", "- {}"),
    ("End every answer with an exclamation mark.", "{}!"),
)


def conversations(count: int, seed: int = 42) -> Iterator[dict]:
    """`count` rows in OpenHermes-2.5's schema, the same bytes for the same (count, seed).

    No two rows have the same first question.
    """
    draw = Draw(seed)
    asked: set[str] = set()
    while len(asked) < count:
        kind = draw.one(KINDS)
        turns = kind(draw)
        turns = turns[: draw.between(1, len(turns))]
        system, style = draw.one(STYLES) if draw.below(4) == 0 else ("", "{}")
        if turns[0][0] in asked:
            continue
        asked.add(turns[0][0])
        messages = [{"from": "system", "value": system}] if system else []
        for question, answer in turns:
            messages.append({"from": "human", "value": question})
            messages.append({"from": "gpt", "value": style.format(answer)})
        yield {"conversations": messages, "source": SOURCE, "category": kind.__name__}


@dataclass(frozen=True, kw_only=True)
class SampleDataConfig(settings.Settings):
    """Write the demo's conversations as JSON lines, which prepare.py reads like any others."""

    to: str = setting("data/sample.jsonl", "the file, which is replaced", path=True)
    num_rows: int = setting(60_000, "conversations", at_least=1)
    seed: int = setting(42, "of all that is drawn", at_least=0, at_most=settings.LARGEST_SEED)


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
    print(f"python prepare.py --source={shlex.quote(str(path))} --data_dir=data/demo")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(SampleDataConfig))
