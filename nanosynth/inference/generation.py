"""Text from a model: the next id from logits, and continuations of a batch of prompts."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model import GPT, KVCache
from nanosynth import tokenizer

HEAD_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, and how many are."""

    max_new_tokens: int  # half the context at most
    temperature: float  # 0: always the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the likeliest tokens up to this much probability
    seed: int = 42
    cuda_graph: bool = False  # see `_capture`

    def room(self, block_size: int) -> int:
        """Tokens of a prompt that leave room for the answer, which takes half the context at
        most.
        """
        return block_size - min(self.max_new_tokens, block_size // 2)


def pick(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The next ids (B,) from logits (B, V); `uniforms` (B,) in [0, 1) are the only randomness."""
    logits = logits[:, : tokenizer.N_IDS].float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        values, ids = logits.topk(min(sampling.top_k, tokenizer.N_IDS))  # sorted, (B, K)
        probabilities = torch.softmax(values, dim=-1)
    else:
        probabilities, ids = _nucleus(logits, sampling.top_p)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= sampling.top_p] = 0.0  # the likeliest token always stays
    cumulative = probabilities.cumsum(dim=-1)
    thresholds = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, thresholds, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # where rounding would go past the end
    return ids.gather(1, torch.minimum(places, last)).squeeze(1)


def _nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens up to at least `top_p`: probabilities and ids (B, K), sorted.

    HEAD_TOKENS of them nearly always hold that much; all are sorted only where they don't.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    values, ids = logits.topk(HEAD_TOKENS)
    probabilities = (values - total).exp()
    suffices = probabilities.sum(dim=-1, keepdim=True) >= top_p
    if suffices.all():
        return probabilities, ids
    # A row keeps its head whatever stands beside it: two orders of equal logits are two answers.
    values, every_id = logits.sort(dim=-1, descending=True, stable=True)
    n_more = logits.shape[1] - HEAD_TOKENS
    head = nn.functional.pad(probabilities, (0, n_more))
    head_ids = nn.functional.pad(ids, (0, n_more))
    probabilities = torch.where(suffices, head, (values - total).exp())
    return probabilities, torch.where(suffices, head_ids, every_id)


@torch.inference_mode()
def stream(
    model: GPT, prompts: list[list[int]], numbers: list[int], sampling: Sampling
) -> Iterator[list[int | None]]:
    """Step by step, the next id of each prompt's continuation; None once a stop id has been given.

    Row b is answer numbers[b] of the seed: it draws from a stream of its own, whatever stands
    beside it. A prompt may have `sampling.room` tokens.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    padded = [prompt + [tokenizer.END_OF_TEXT] * (longest - len(prompt)) for prompt in prompts]
    max_new_tokens = min(sampling.max_new_tokens, model.config.block_size // 2)
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    last = torch.arange(len(prompts)) * longest + lengths - 1
    logits = model(torch.tensor(padded).to(device), logit_index=last.to(device), cache=cache)
    cache.advance(lengths.to(device))
    draws = [
        np.random.default_rng([sampling.seed, number]).random(max_new_tokens) for number in numbers
    ]
    uniforms = torch.tensor(np.stack(draws, axis=1)).to(device)  # (max_new_tokens, B)
    step = _capture(model, cache) if sampling.cuda_graph else functools.partial(_step, model, cache)
    finished = [False] * len(prompts)
    for n_new in range(1, max_new_tokens + 1):
        next_ids = pick(logits, uniforms[n_new - 1], sampling)
        values = next_ids.tolist()
        yield [None if done else id for id, done in zip(values, finished, strict=True)]
        finished = [
            done or id in tokenizer.STOP_IDS for id, done in zip(values, finished, strict=True)
        ]
        if all(finished) or n_new == max_new_tokens:
            return
        logits = step(next_ids)


def _step(model: GPT, cache: KVCache, ids: Tensor) -> Tensor:
    """Logits (B, V) behind one more token of each row, ids (B,)."""
    logits = model(ids[:, None], cache=cache)
    cache.advance(torch.ones_like(ids))
    return logits


def _capture(model: GPT, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """`_step` as one CUDA graph: a token's hundreds of small kernels are launched at once.

    The shapes must stay, so it attends over the whole cache. The logits are overwritten by the
    next call.
    """
    cache.fix()
    ids = torch.zeros_like(cache.lengths)
    lengths, end = cache.lengths.clone(), cache.end
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up outside of the capture
        _step(model, cache, ids)
        cache.lengths.copy_(lengths)
    torch.cuda.current_stream().wait_stream(side)
    cache.end = end
    with torch.cuda.graph(graph):
        logits = _step(model, cache, ids)

    def replay(next_ids: Tensor) -> Tensor:
        ids.copy_(next_ids)
        graph.replay()
        return logits

    return replay


def generate(
    model: GPT, prompts: list[list[int]], numbers: list[int], sampling: Sampling
) -> list[list[int]]:
    """The ids of each prompt's continuation, stop id included; arguments as of `stream`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for ids in stream(model, prompts, numbers, sampling):
        for continuation, id in zip(continuations, ids, strict=True):
            if id is not None:
                continuation.append(id)
    return continuations
