"""Text from a model: the next id from logits, and continuations of prompts."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import GPT, KVCache
from nanosynth import UserError, tokenizer

# A trained model's likeliest 1,024 tokens nearly always hold top_p of the probability, and are
# found in an eighth of the time that sorting the whole vocabulary takes.
HEAD_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, and how many are."""

    max_new_tokens: int  # half the context at most
    temperature: float  # 0: always the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the likeliest tokens up to this much probability
    seed: int = 42
    cuda_graph: bool = False  # see `_by_graph`

    def room(self, block_size: int) -> int:
        """Tokens of a prompt that leave room for the answer: at least half the context."""
        return block_size - min(self.max_new_tokens, block_size // 2)


def pick(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The next ids (B,) from logits (B, V); `uniforms` (B,) in [0, 1) are the only randomness.

    By inverse transform: the cumulative distribution is a line of stretches, one a token and as
    long as its probability, and a uniform number falls into one of them. So an answer depends on
    its own numbers alone; torch.multinomial draws from one generator for the whole batch.
    """
    logits = logits[:, : tokenizer.N_IDS].float()  # padding ids are never picked
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
    cumulative = probabilities.cumsum(dim=-1)  # its last value is what was kept, 1 or less
    thresholds = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, thresholds, right=True)
    # A uniform just below 1 rounds to 1 in float32, which would be one past the last kept token.
    last = (probabilities > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return ids.gather(1, torch.minimum(places, last)).squeeze(1)


def _nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens up to at least `top_p`: probabilities and ids (B, K), sorted.

    HEAD_TOKENS of them if that suffices, else all.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    values, ids = logits.topk(HEAD_TOKENS)
    probabilities = (values - total).exp()
    suffices = probabilities.sum(dim=-1, keepdim=True) >= top_p
    if suffices.all():
        return probabilities, ids
    # topk and sort may put equal logits in different orders, so a row whose head suffices keeps
    # it: what it gives must not depend on the rows beside it.
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
    beside it. A prompt may have `sampling.room` tokens. UserError where a logit is not finite.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    padded = [prompt + [tokenizer.END_OF_TEXT] * (longest - len(prompt)) for prompt in prompts]
    max_new_tokens = min(sampling.max_new_tokens, model.config.block_size // 2)
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    last = torch.arange(len(prompts)) * longest + lengths - 1  # each row's last token, in (B*T)
    logits = model(torch.tensor(padded).to(device), logit_index=last.to(device), cache=cache)
    cache.advance(lengths.to(device))
    draws = [
        np.random.default_rng([sampling.seed, number]).random(max_new_tokens) for number in numbers
    ]
    uniforms = torch.tensor(np.stack(draws, axis=1)).to(device)  # (max_new_tokens, B)
    by_graph = sampling.cuda_graph
    step = _by_graph(model, cache) if by_graph else functools.partial(_step, model, cache)
    finished = [False] * len(prompts)
    for n_new in range(1, max_new_tokens + 1):
        next_ids = pick(logits, uniforms[n_new - 1], sampling)
        is_finite = logits.sum(dim=-1, dtype=torch.float32).isfinite()
        values = torch.where(is_finite, next_ids, -1).tolist()  # one transfer tells of both
        if -1 in values:
            mend = "take an older --step, or --dtype=float32"
            raise UserError(f"the model's logits are not finite: it diverged; {mend}")
        yield [None if done else id for id, done in zip(values, finished, strict=True)]
        # <|im_end|> ends an answer, <|endoftext|> a plain text. A finished row goes on, unread,
        # until the longest is done.
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


def _by_graph(model: GPT, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """`_step` by CUDA graphs: a token's hundreds of small kernels are launched at once.

    A graph has one shape. The first step of each number of keys runs as it is, which loads its
    kernels; the second is recorded; the others replay it, over the logits of the one before.
    """
    ids = torch.zeros_like(cache.lengths)
    n_keys, graph, logits = 0, None, None

    def step(next_ids: Tensor) -> Tensor:
        nonlocal n_keys, graph, logits
        ids.copy_(next_ids)
        if cache.n_keys(1) != n_keys:
            n_keys, graph = cache.n_keys(1), None
            return _step(model, cache, ids)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and computes nothing
                logits = _step(model, cache, ids)
        else:
            cache.end += 1  # on the host, which a replay does not pass through
        graph.replay()
        return logits

    return step


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


def answer_all(
    model: GPT, prompts: list[list[int]], sampling: Sampling, batch_size: int
) -> list[tuple[list[int], bool]]:
    """(ids without the stop id, whether one came) of each prompt's answer, in the prompts' order.

    Answer n is number n of the seed, in whichever batch it is made.
    """
    answers: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, unit="batch", disable=None, desc="generate"):
        numbers = by_length[start : start + batch_size]  # like lengths: little padding
        batch = [prompts[number] for number in numbers]
        for number, ids in zip(numbers, generate(model, batch, numbers, sampling), strict=True):
            ended = ids[-1] in tokenizer.STOP_IDS
            answers[number] = (ids[:-1] if ended else ids, ended)
    return answers
