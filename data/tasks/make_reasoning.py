"""Writes reasoning.jsonl: short problems whose answer follows from the words alone.

Usage: python data/tasks/make_reasoning.py. The same bytes each time; a test holds the file to it.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from make_sample import COLOURS, DAYS, NAMES, WORDS, Draw, listed  # noqa: E402

ITEMS_PER_KIND = 12
PLACES = "box bag drawer cupboard basket pocket".split()
ANALOGIES = (
    "puppy:dog kitten:cat lamb:sheep calf:cow chick:hen foal:horse; "
    "hand:glove foot:sock head:hat neck:scarf waist:belt eye:lens; "
    "king:queen boy:girl father:mother uncle:aunt son:daughter man:woman"
)
Problem = tuple[str, str, list[str]]  # question, right answer, three wrong ones


def ordering(draw: Draw) -> Problem:
    """A is taller than B. B is taller than C. C is taller than D. Who is the tallest? -> A"""
    names = draw.some(NAMES, 4)
    more, most, least = draw.one(
        (
            ("taller", "tallest", "shortest"),
            ("older", "oldest", "youngest"),
            ("faster", "fastest", "slowest"),
            ("richer", "richest", "poorest"),
        )
    )
    facts = [f"{a} is {more} than {b}." for a, b in zip(names, names[1:], strict=False)]
    top = draw.below(2)
    question = f"{listed(draw.some(facts, 3))} Who is the {most if top else least}?"
    right = names[0] if top else names[-1]
    return question, right, [name for name in names if name != right]


def inheritance(draw: Draw) -> Problem:
    """All cups are red. All pens are blue. Tom has a pen. What colour is it? -> blue"""
    things, colours = draw.some(WORDS, 3), draw.some(COLOURS, 4)
    facts = [f"Every {a} here is {b}." for a, b in zip(things, colours, strict=False)]
    asked = draw.below(3)
    question = f"{listed(facts)} {draw.one(NAMES)} takes one {things[asked]}. What colour is it?"
    return question, colours[asked], [c for c in colours if c != colours[asked]]


def elimination(draw: Draw) -> Problem:
    """One of A, B, C and D has the hat. It is not A, not B and not C. Who has it? -> D"""
    names, thing = draw.some(NAMES, 4), draw.one(WORDS)
    right = draw.one(names)
    others = draw.some([name for name in names if name != right], 3)
    denied = " ".join(f"{name} does not have it." for name in others)
    question = f"One of {', '.join(names[:3])} and {names[3]} has the {thing}. {denied} Who has it?"
    return question, right, others


def tracking(draw: Draw) -> Problem:
    """The pen is in the box. Tom moves it to the bag. Where is the pen? -> in the bag"""
    thing, name, places = draw.one(WORDS), draw.one(NAMES), draw.some(PLACES, 4)
    question = f"{name} puts the {thing} in the {places[0]}. Later {name} takes it out and "
    question += f"moves it to the {places[1]}. The {places[2]} stays empty. Where is the {thing}?"
    answers = [f"in the {place}" for place in places]
    return question, answers[1], [answers[0], *answers[2:]]


def number_sequence(draw: Draw) -> Problem:
    """Which number comes next: 3, 5, 7, 9? -> 11"""
    first, step = draw.between(1, 9), draw.between(2, 6)
    numbers = [first + step * place for place in range(5)]
    question = f"Which number comes next: {', '.join(map(str, numbers[:4]))}?"
    right = numbers[4]
    wrong = draw.some([right - 2, right - 1, right + 1, right + 2, right + step], 3)
    return question, f"{right}", [f"{number}" for number in wrong]


def word_sum(draw: Draw) -> Problem:
    """Tom has 5 coins. He gives 2 to Anna. How many coins has Tom left? -> 3"""
    name, friend = draw.some(NAMES, 2)
    a, b = draw.between(6, 12), draw.between(1, 5)
    gives = draw.below(2)
    deed = f"gives {b} to {friend}" if gives else f"gets {b} more from {friend}"
    question = f"{name} has {a} coins and {deed}. How many coins does {name} have now?"
    right = a - b if gives else a + b
    wrong = draw.some([n for n in (right - 2, right - 1, right + 1, right + 2, a) if n != right], 3)
    return question, f"{right}", [f"{number}" for number in wrong]


def weekday(draw: Draw) -> Problem:
    """Today is Monday. Which day is it in three days? -> Thursday"""
    today, ahead = draw.below(7), draw.between(2, 4)
    right = DAYS[(today + ahead) % 7]
    words = {2: "two", 3: "three", 4: "four"}
    question = f"Today is {DAYS[today]}. Which day is it in {words[ahead]} days?"
    return question, right, draw.some([day for day in DAYS if day != right], 3)


def analogy(draw: Draw) -> Problem:
    """Puppy is to dog as kitten is to what? -> cat"""
    pairs = [pair.split(":") for pair in draw.one(ANALOGIES.split("; ")).split()]
    (a, b), (c, right), *rest = draw.some(pairs, 6)
    wrong = draw.some([b, *(pair[1] for pair in rest)], 3)
    return f"{a.capitalize()} is to {b} as {c} is to what?", right, wrong


def sitting(draw: Draw) -> Problem:
    """A sits left of B. B sits left of C. C sits left of D. Who sits right next to A? -> B"""
    names = draw.some(NAMES, 4)
    question = f"From left to right sit {', '.join(names[:3])} and {names[3]}. "
    place, side = draw.one(((0, 1), (1, 1), (2, 1), (1, -1), (2, -1), (3, -1)))
    where = "right" if side == 1 else "left"
    question += f"Who sits directly to the {where} of {names[place]}?"
    right = names[place + side]
    return question, right, [name for name in names if name != right]


def condition(draw: Draw) -> Problem:
    """If it rains, Tom reads. If it snows, Tom cooks. Today it snows. What does Tom do? -> cooks"""
    name = draw.one(NAMES)
    acts = draw.some("reads cooks sings runs paints sleeps writes swims".split(), 4)
    days = draw.some(DAYS, 3)
    rules = [f"On {day} {name} {act}." for day, act in zip(days, acts, strict=False)]
    asked = draw.below(3)
    question = f"{listed(rules)} Today is {days[asked]}. What does {name} do?"
    return question, f"{name} {acts[asked]}", [f"{name} {a}" for a in acts if a != acts[asked]]


KINDS = (
    *(ordering, inheritance, elimination, tracking, number_sequence),
    *(word_sum, weekday, analogy, sitting, condition),
)


def items(seed: int = 42) -> list[dict]:
    """ITEMS_PER_KIND different problems of each kind, each answer place equally often."""
    draw = Draw(seed)
    made: dict[str, dict] = {}
    for kind in KINDS:
        places = draw.some([number % 4 for number in range(ITEMS_PER_KIND)], ITEMS_PER_KIND)
        while places:
            question, right, wrong = kind(draw)
            if question in made or len({right, *wrong}) != 4:
                continue
            place = places.pop()
            choices = draw.some(wrong, 3)
            choices.insert(place, right)
            made[question] = {"kind": kind.__name__, "question": question}
            made[question] |= {"choices": choices, "answer": place}
    return list(made.values())


def text() -> str:
    return "".join(json.dumps(item) + "\n" for item in items())


if __name__ == "__main__":
    (FOLDER / "reasoning.jsonl").write_text(text(), encoding="utf-8")
