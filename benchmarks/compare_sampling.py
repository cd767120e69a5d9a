"""Sampling speed beside nanoGPT's generate and transformers' generate, with the same weights.

One text of `max_new_tokens` at a time from nanoGPT; one and a batch from transformers. All draw at
temperature 0.8 from the 200 likeliest tokens, nanoGPT's own setting.

Usage:
    python -m benchmarks.compare_sampling --nanogpt=PATH
    python -m benchmarks.compare_sampling --nanogpt=PATH --device=cuda --config=config/500m.py
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers

from benchmarks import alternate
from benchmarks.alternate import Contender
from model import GPT, GPTConfig
from nanosynth import settings, tokenizer
from nanosynth.device import choose_device, choose_dtype
from nanosynth.inference import generation
from nanosynth.inference.speed import speed_up_inference
from nanosynth.settings import setting

PROMPT = list(range(1000, 1016))
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
TEMPERATURE, TOP_K = 0.8, 200


@dataclass(frozen=True, kw_only=True)
class ModelConfig(settings.Settings):
    """The model that all sides of a comparison have."""

    config: str = setting(
        "", "take the shape of this config file of ours", group="The model", path=True
    )
    n_layer: int = setting(12, "blocks", at_least=1)
    n_head: int = setting(12, "attention heads", at_least=1)
    n_embd: int = setting(768, "channels", at_least=1)
    block_size: int = setting(1024, "context, in tokens", at_least=1)
    device: str = setting("cpu", "cpu or cuda")
    dtype: settings.DTYPE = setting(
        "auto", "ours and transformers'; auto: float16 on CUDA, bfloat16 on a CPU that has it"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ModelConfig):
    """Tokens/s of generation, ours against nanoGPT's and transformers'."""

    nanogpt: str = setting(
        "",
        "a checkout of github.com/karpathy/nanoGPT; empty: without it",
        group="The comparison",
        path=True,
    )
    max_new_tokens: int = setting(256, "tokens of each text", at_least=1)
    batch_size: int = setting(16, "texts at once, beside one at a time", at_least=1)
    pairs: int = setting(3, "turns of each side", at_least=1)
    json: str = setting("", "file for the figures", path=True)

    worker: Literal["", "ours", "nanogpt", "transformers"] = setting(
        "", "which side this process is", group="Set by this program for its own processes"
    )
    weights: str = setting("", "file of the weights that all sides have", path=True)


def gpt_config(config: ModelConfig) -> GPTConfig:
    given = settings.read_config(config.config) if config.config else vars(config)
    return GPTConfig(vocab_size=tokenizer.VOCAB_SIZE, **{name: given[name] for name in SHAPE})


def ours(config: SamplingConfig) -> Callable[[int], int]:
    """A function that generates so many tokens a text, and says how many came."""
    device = choose_device(config.device)
    model = GPT(gpt_config(config))
    model.load_state_dict(torch.load(config.weights))
    dtype = choose_dtype(config.dtype, device)
    model.to(device, dtype).eval()
    speed_up_inference(model, dtype)
    numbers = list(range(config.batch_size))

    def generate(n_tokens: int) -> int:
        sampling = generation.Sampling(
            max_new_tokens=n_tokens,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            seed=0,
            cuda_graph=device.type == "cuda",
        )
        prompts = [PROMPT] * config.batch_size
        texts = generation.generate(model, prompts, numbers, sampling)
        return sum(map(len, texts))

    return generate


def nanogpt(config: SamplingConfig) -> Callable[[int], int]:
    """As its sample.py does: float32 weights, and autocast on CUDA alone."""
    theirs = sys.modules["model"]  # read from its checkout, see `work`
    shape = gpt_config(config)
    keys = {name: getattr(shape, name) for name in (*SHAPE, "vocab_size")}
    model = theirs.GPT(theirs.GPTConfig(**keys, bias=True, dropout=0.0))
    model.load_state_dict(torch.load(config.weights))
    model.to(config.device).eval()
    on_cuda = config.device.startswith("cuda")
    prompt = torch.tensor([PROMPT] * config.batch_size, device=config.device)

    @torch.no_grad()
    def generate(n_tokens: int) -> int:
        with torch.autocast("cuda", torch.float16, enabled=on_cuda):
            ids = model.generate(prompt, n_tokens, temperature=TEMPERATURE, top_k=TOP_K)
        return ids[:, len(PROMPT) :].numel()

    return generate


def peer(config: SamplingConfig) -> Callable[[int], int]:
    shape = gpt_config(config)
    device = choose_device(config.device)
    model = as_transformers(shape, torch.load(config.weights))
    model.to(device, choose_dtype(config.dtype, device)).eval()
    model.generation_config.eos_token_id = None  # all texts are of one length
    prompt = torch.tensor([PROMPT] * config.batch_size, device=device)

    def generate(n_tokens: int) -> int:
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            top_p=1.0,
            pad_token_id=tokenizer.END_OF_TEXT,
        )
        return ids[:, len(PROMPT) :].numel()

    return generate


def as_transformers(shape: GPTConfig, weights: dict) -> transformers.GPT2LMHeadModel:
    """Our weights in GPT2LMHeadModel, whose matrices are transposed (Conv1D)."""
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
        )
    )
    matrices = ("attn.c_attn.weight", "c_proj.weight", "mlp.c_fc.weight")
    theirs.load_state_dict(
        {name: value.T if name.endswith(matrices) else value for name, value in weights.items()}
    )
    return theirs


def work(config: SamplingConfig) -> None:
    """A worker: ready after a short text, then a text for each line that it reads."""
    makers = {"ours": ours, "nanogpt": nanogpt, "transformers": peer}
    if config.worker == "nanogpt":
        del sys.modules["model"]
        sys.path.insert(0, config.nanogpt)
        import model  # noqa: F401  nanoGPT's
    generate = makers[config.worker](config)
    generate(8)
    print("ready")
    for _ in sys.stdin:
        n_tokens = generate(config.max_new_tokens)
        assert n_tokens == config.max_new_tokens * config.batch_size, n_tokens
        print("ready")


def contenders(config: SamplingConfig, weights: Path) -> list[Contender]:
    shape = gpt_config(config)
    shared = {name: getattr(shape, name) for name in SHAPE}
    shared |= {"device": config.device, "max_new_tokens": config.max_new_tokens}
    shared |= {"weights": weights, "dtype": config.dtype}
    found = []
    entries = [("ours", 1), ("transformers", 1)]
    if config.nanogpt:
        entries.append(("nanogpt", 1))
        shared["nanogpt"] = Path(config.nanogpt).resolve()
    if config.batch_size > 1:
        entries += [("ours", config.batch_size), ("transformers", config.batch_size)]
    for worker, batch_size in entries:
        values = {**shared, "worker": worker, "batch_size": batch_size}
        flags = [f"--{name}={value}" for name, value in values.items()]
        found.append(
            Contender(
                name=f"{worker}, batch {batch_size}",
                command=["-m", "benchmarks.compare_sampling", *flags],
                line="^ready",
                n_tokens=batch_size * config.max_new_tokens,
                asks=True,
            )
        )
    return found


def main(config: SamplingConfig) -> None:
    if config.worker:
        work(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = Path(folder) / "weights.pt"
        torch.save(GPT(gpt_config(config)).state_dict(), weights)
        entries = contenders(config, weights)
        speeds, _ = alternate.alternate(
            entries, n_pairs=config.pairs, n_units=1, n_untimed=0, n_first=0, fresh=False
        )
    pairs = [
        (f"ours, {batch}", name)
        for name in speeds
        for worker, batch in [name.split(", ")]
        if worker != "ours"
    ]
    device = choose_device(config.device)
    facts = alternate.circumstances(config.device, transformers=transformers.__version__)
    facts |= {name: getattr(gpt_config(config), name) for name in SHAPE}
    facts["dtype"] = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    facts["max_new_tokens"] = config.max_new_tokens
    alternate.report(alternate.pair_up(speeds, pairs), facts, "tokens", config.json)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(SamplingConfig))
