"""How a run was made, in lines for a reader: commands, versions, cost, skipped steps, data."""

from nanosynth import criteria, metrics, runs
from nanosynth.device import DTYPES

SPLIT_RULE = (
    "a conversation is validation by a hash of the seed and its first user turn (case and spaces "
    "apart), so that one first turn never stands on both sides"
)


def section(run: runs.Run, events: criteria.Events) -> str:
    """How the run was made, so that it can be made again."""
    config, spent, lines = run.config, runs.timing(run), []
    for start in config.get("starts") or ():
        lines.append(
            f"{start['date']}, step {start['first_step']:,}, {start['world_size']} x "
            f"{start['device']}, commit {start.get('commit') or 'unknown'}: `{start['command']}`"
        )
    if config:
        versions = [f"torch {config['torch']}", f"CUDA {config.get('cuda') or 'none'}"]
        versions += [f"Python {config.get('python', 'unknown')}", config.get("platform", "")]
        lines.append(
            f"{config['parameters']:,} parameters, {config['dtype']}, {config['world_size']} x "
            f"{config['device']}, {', '.join(filter(None, versions))}"
        )
        lines.append(", ".join(f"{k}={v!r}" for k, v in config["settings"].items()))
    if spent["train"]:
        lines += _speed(run, spent)
    skipped = {**events._asdict(), "all skipped": [r["step"] for r in run.train if r["skipped"]]}
    for kind, steps in skipped.items():
        if steps:
            name = kind.replace("_", " ")
            count = f"{len(steps):,} of {run.steps:,} steps"
            lines.append(f"{name}: {count}, {criteria.numbers(steps)}")
    if run.checkpoints:
        lines.append(
            f"checkpoints at steps {criteria.numbers(list(run.checkpoints))}; best {run.best}"
        )
    return "\n".join(f"- {line}" for line in lines + _data(run.data))


def _speed(run: runs.Run, spent: dict[str, float]) -> list[str]:
    device, dtype = run.config.get("device", "unknown"), run.config.get("dtype", "float32")
    peak = metrics.peak_flops(device, DTYPES[dtype]) if dtype in DTYPES else None
    mfu = "MFU not known: the device's peak is not"
    if peak and spent["mfu"]:
        mfu = f"MFU {spent['mfu'] / spent['train']:.1%} of {peak / 1e12:g} TFLOP/s a device"
    hours = spent["device"] / 3600
    budget = f"{hours:.3f} device-hours on {device}; the budget of {criteria.GPU_HOURS:g} GPU-hour "
    if device in ("cpu", "unknown"):
        budget += "is one of GPUs"
    else:
        budget += "holds" if hours <= criteria.GPU_HOURS else "is exceeded"
    wall = (spent["train"] + spent["eval"]) / 3600
    return [
        f"{run.train[-1]['tokens']:,} tokens seen in {run.steps:,} steps; "
        f"{spent['tokens'] / spent['train']:,.0f} tokens a second over all devices; {mfu}",
        f"{wall:.3f} hours, added up from each step's speed, of which evaluation "
        f"{spent['eval'] / 3600:.3f}; {budget}",
    ]


def _data(meta: dict) -> list[str]:
    if not meta:
        return []
    plain = {key: value for key, value in meta.items() if isinstance(value, (str, int, float))}
    lines = ["data: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in plain.items())]
    if dropped := meta.get("rows_dropped"):
        lines.append("rows dropped: " + ", ".join(f"{k} {v}" for k, v in dropped.items()))
    for split, counts in (meta.get("splits") or {}).items():
        known = {key: count for key, count in counts.items() if isinstance(count, int)}
        text = ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in known.items())
        lines.append(f"{split}: {text}; SHA-256 {meta['files'][f'{split}.bin']['sha256']}")
    if "val_fraction" in meta:
        lines.append(f"split rule: {SPLIT_RULE}")
    return lines
