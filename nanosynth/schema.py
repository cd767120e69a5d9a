"""Whether a JSON file that anybody may have edited holds what is used of it.

A schema names fields and their kinds: 'loss:number|null' is a number or null, 'seed?:count' may be
absent; * stands for fields of any name.
"""

from collections.abc import Callable

LARGEST = 1e100  # a figure beyond is no measurement, and sums of it overflow

KINDS: dict[str, Callable[[object], bool]] = {
    "text": lambda value: isinstance(value, str),
    "count": lambda value: type(value) is int and 0 <= value < 2**63,
    "number": lambda value: type(value) in (int, float) and abs(value) <= LARGEST,
    "positive": lambda value: type(value) in (int, float) and 0 < value <= LARGEST,
    "nan": lambda value: value != value,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "train": lambda value: value == "train",
    "val": lambda value: value == "val",
    "end": lambda value: value == "end",
}


def fields(text: str, **nested: object) -> dict:
    """
    >>> fields("step:count loss?:number|null", starts=[fields("command:text")])
    {'step': 'count', 'loss?': 'number|null', 'starts': [{'command': 'text'}]}
    """
    return dict(field.split(":") for field in text.split()) | nested


def misfit(value: object, wanted: str | list | dict, name: str = "it") -> str:
    """How `value` is not what a schema wants; empty where it fits.

    >>> misfit({"step": 3}, fields("step:count loss:number|null"))
    'it lacks loss'
    >>> misfit({"step": 3, "loss": "low"}, fields("step:count loss:number|null"))
    "loss is 'low', wanted number|null"
    """
    if isinstance(wanted, str):
        fits = any(KINDS[kind](value) for kind in wanted.split("|"))
        return "" if fits else f"{name} is {value!r:.40}, wanted {wanted}"
    if not isinstance(value, type(wanted)):
        return f"{name} is {value!r:.40}, wanted {'[...]' if isinstance(wanted, list) else '{...}'}"
    if isinstance(wanted, list):
        inside = [(f"{name}[{place}]", part, wanted[0]) for place, part in enumerate(value)]
    elif "*" in wanted:
        inside = [(key, part, wanted["*"]) for key, part in value.items()]
    else:
        absent = [key for key in wanted if not key.endswith("?") and key not in value]
        if absent:
            return f"{name} lacks {', '.join(absent)}"
        kinds = {key.removesuffix("?"): kind for key, kind in wanted.items()}
        inside = [(key, value[key], kind) for key, kind in kinds.items() if key in value]
    return next(filter(None, (misfit(part, kind, key) for key, part, kind in inside)), "")
