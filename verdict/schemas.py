"""What a report uses of each file in a run's folder, and whether a file has it.

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


CONFIG = {
    **fields("parameters?:count|null max_steps?:count|null world_size?:count"),
    "settings?": fields("seed?:count data_dir?:text"),
    "starts?": [fields("command:text first_step:count world_size:count")],
}
TRAIN_LINE = fields(
    "split:train step:count loss:number|null lr:number grad_norm:number|null loss_scale:number "
    "skipped:count tokens:count tokens_per_second:positive mfu:number|null "
    "device_hours?:number"
)
VAL_LINE = fields("split:val step:count loss:number|null seconds:number device_hours?:number")
END_LINE = fields("split:end step:count device_hours:number")
SAMPLE = fields(
    "prompt:text text:text finish:text tokens:count coherent?:boolean exact?:boolean obeys?:boolean"
)
CHECKPOINT = fields("step:count", identity=fields("data_sha256?:text|null") | {"model?": {}})
# null, or NaN in an older file: of a model that diverged.
SCORED = fields(
    "perplexity:positive|nan|null bits_per_byte:number|nan|null tokens:count loss?:number|nan|null"
)
SCORED["perplexity_95"] = ["number|nan|null"]
BY_LABEL = {"*": {"all?": SCORED, "assistant?": SCORED, "documents": "count"}}
PERPLEXITY = {
    **fields("checkpoint:text data:text data_sha256:text loss_on:text|null"),
    **{"all": SCORED, "assistant?": SCORED},
    "by_source?": BY_LABEL,
    "by_category?": BY_LABEL,
    "by_position?": [fields("loss:number|nan|null tokens:count", before=["count"])],
}
COHERENT = fields("passed:count n:count share:number", interval=["number"])
ANSWERS = {
    "coherent": COHERENT,
    "coherent_of_references?": fields("share:number", interval=["number"]),
    "judges_disagree?": fields("n:count share:number"),
}
TASKS = {
    **fields("format_version?:count step?:count rule?:text"),
    "settings?": {"*": fields("seconds:number num_prompts?:count")},
    "generation?": {"*": {"*": ANSWERS}},  # by set of prompts and mode
    "zero_shot?": {
        "*": fields(
            "metric:text score:number|nan n:count stderr?:number|nan|null chance?:number|null "
            "limit?:count"
        )
    },
    "published?": {"*": [fields("model:text score:number source:text metric?:text")]},
}
ITEMS = {"*": {"step": "count", "scores": ["number"]}}
CONTROL = {
    "control": "text",
    "made_of?": ["text"],
    "unlike": ["text"],
    "differences": [
        fields("what:text of:text n:count run:number control:number difference:number")
        | {"interval": ["number"]}
    ],
}
DATA = {"files": {"*": fields("sha256:text")}}


def misfit(value: object, wanted: str | list | dict, name: str = "it") -> str:
    """How `value` is not what a schema wants; empty where it fits.

    >>> misfit({"split": "val", "step": 3, "loss": 2.5}, VAL_LINE)
    'it lacks seconds'
    >>> misfit({"split": "val", "step": 3, "loss": "low", "seconds": 1.5}, VAL_LINE)
    "loss is 'low', wanted number|null"
    """
    if isinstance(wanted, str):
        fits = any(KINDS[kind](value) for kind in wanted.split("|"))
        return "" if fits else f"{name} is {value!r:.40}, wanted {wanted}"
    if not isinstance(value, type(wanted)):
        return f"{name} is {value!r:.40}, wanted {'[...]' if wanted is list else '{...}'}"
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
