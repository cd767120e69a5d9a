"""What a report uses of each file in a run's folder, by nanosynth.schema."""

from nanosynth.schema import fields

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
    "prompt:text text:text finish:text tokens:count coherent?:boolean exact?:boolean "
    "obeys?:boolean set?:text mode?:text sample?:count"
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
            "limit?:count asked_as?:text"
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
