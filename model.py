"""GPT-2: the model, its key-value cache, and the counts that throughput figures stand on.

Learned positions, pre-norm LayerNorm, GELU, tied embedding; state-dict names as in nanoGPT, so
weights move to and from it and Hugging Face's GPT2LMHeadModel. Imports torch only.

Shapes: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary, L layers,
S cached time, N scored positions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# torch's name of each: GPT-2 was trained with the tanh approximation, nanoGPT computes it exactly.
GELUS = {"gelu_tanh": "tanh", "gelu": "none"}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int  # the longest context, in tokens
    vocab_size: int
    dropout: float = 0.0
    bias: bool = True  # in every Linear and LayerNorm, as GPT-2 has it
    activation: str = "gelu_tanh"  # one of GELUS

    @property
    def n_weights(self) -> int:
        """Of the matrices and embeddings, which are nearly all parameters; nothing is built."""
        matrices = 12 * self.n_layer * self.n_embd**2  # of attention and MLP
        return matrices + self.n_embd * (self.vocab_size + self.block_size)


KEY_STEP = 128  # keys of a cached attention are a multiple of it


class KVCache:
    """Keys and values of the tokens seen so far, one row a sequence, rows of any lengths.

    A token's keys and values never change once it is seen (attention is causal), so generating one
    more token costs one token's matrix products instead of the whole text's.

    A chunk of T tokens is written behind each row's `lengths`. Rows shorter than the chunk are
    padded on the right: what stands past a row's length is never attended to, and overwritten.

    The keys in use grow by KEY_STEP at a time, those not yet written masked: what is set up once
    for a shape, as a CUDA graph, then serves many tokens.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_tokens: int, like: Tensor):
        head_size = config.n_embd // config.n_head
        capacity = math.ceil(max_tokens / KEY_STEP) * KEY_STEP
        # (L, B, S, H, D): time before heads, so that a token is written in one piece.
        shape = (config.n_layer, batch_size, capacity, config.n_head, head_size)
        # On a CPU, bfloat16 attention of single queries takes several times as long as float32's.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self.keys = torch.zeros(shape, device=like.device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)  # (B,)
        self.end = 0  # tokens placed; kept on the host, which need not ask a GPU how long rows are

    def n_keys(self, n_tokens: int) -> int:
        """Keys that the next chunk of `n_tokens` attends over."""
        return math.ceil((self.end + n_tokens) / KEY_STEP) * KEY_STEP

    def place(self, n_tokens: int) -> Tensor:
        """Positions (B, T) of the next chunk of `n_tokens`, which must fit."""
        self._n_keys = self.n_keys(n_tokens)
        self.end += n_tokens
        assert self.end <= self.keys.shape[2], "the cache is full"
        self._positions = self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)
        # A query sees the keys up to its own position: all that its row has seen, and no padding.
        keys = torch.arange(self._n_keys, device=self.lengths.device)
        self._mask = (keys <= self._positions[:, :, None])[:, None]  # (B, 1, T, S)
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v at the placed positions, then attend with q; all (B, H, T, D)."""
        # Each row writes at its own positions: rows of a batch are of any lengths.
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        self.keys[layer, rows, self._positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer, rows, self._positions] = v.transpose(1, 2).to(self.keys.dtype)
        keys = self.keys[layer, :, : self._n_keys].transpose(1, 2)  # (B, H, S, D)
        values = self.values[layer, :, : self._n_keys].transpose(1, 2)
        y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=self._mask)
        return y.to(q.dtype)

    def advance(self, n_tokens: Tensor) -> None:
        """Count `n_tokens` (B,) of the placed chunk as seen: the rest of it was padding."""
        self.lengths += n_tokens


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.layer = layer

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        # q, k and v in one product, as GPT-2 stores them: (B, T, C) -> (B, T, 3C) -> 3 x (B, T, C).
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # -> (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is None:
            # Flash attention where the device has it: the (T, T) scores are never written out.
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))  # the heads' results mixed: (B, T, C)


class MLP(nn.Module):
    """Two linear maps around a GELU, four times as wide within, at each position by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = GELUS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream x (B, T, C).

    Normalised before and not after (GPT-2, section 2.3): the stream itself runs through unscaled,
    so gradients reach the first block whatever the depth.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: embeddings, blocks, a last LayerNorm, and logits by the embedding itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.config = config
        self.gradient_checkpointing = False  # train.py sets it
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tied: one matrix reads tokens and writes them (Press and Wolf 2017).
        self.lm_head.weight = self.transformer.wte.weight
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation (section 2.3): 0.02, and for the 2L projections into the residual
        stream 0.02 / sqrt(2L), so that the variance of their sum does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def zero_projections(self) -> None:
        """Start every block as the identity: its projections into the residual stream are zero, so
        the first steps train the embedding, and the blocks come in as they have something to say.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.zero_()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        logit_index: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Cross entropy in nats (N,), float32, one for each target; without targets, logits (N, V).

        ids (B, T). `logit_index` (N,) picks positions of the flattened (B*T) to score, so the
        vocabulary's matrix product is paid where it counts alone; None scores all, N = B*T.
        """
        B, T = ids.shape
        assert self.config.block_size >= T, f"{T} tokens exceed block_size {self.config.block_size}"
        positions = torch.arange(T, device=ids.device) if cache is None else cache.place(T)
        # (B, T) -> (B, T, C)
        x = self.transformer.drop(self.transformer.wte(ids) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                # Keeps x alone, and computes the block's inside again for the backward pass.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        return self.score(x.view(B * T, -1), targets, logit_index)

    def score(self, x: Tensor, targets: Tensor | None, logit_index: Tensor | None) -> Tensor:
        """The end of `forward`: what it returns, of the stream x (B*T, C) behind the last block."""
        # Pre-norm leaves the stream's scale free; the last LayerNorm sets it for the logits.
        x = self.transformer.ln_f(x)
        if logit_index is not None:
            # The head is the largest product of all: none for tokens that count nowhere.
            x = x[logit_index]  # (N, C)
        logits = self.lm_head(x)  # (N, V)
        if targets is None:
            return logits
        # In float32, whatever the products were in: exp and the sum over 50,304 need the digits.
        # Not reduced: the caller divides the sum by what the whole step counts.
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def compile(self, **options) -> None:
        """torch.compile of each block and of `score`, in place, so that state-dict names stay.

        The blocks are alike and share one graph, so it takes as long at any depth; and DDP sends a
        block's gradients while the backward pass of the block before it runs.
        """
        for block in self.transformer.h:
            block.compile(**options)
        self.score = torch.compile(self.score, **options)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `max_tokens` tokens."""
        return KVCache(self.config, batch_size, max_tokens, like=self.transformer.wte.weight)

    def n_parameters(self) -> int:
        """Parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, n_tokens: int, n_scored: int) -> int:
        """Of forward and backward over `n_tokens` in full rows with logits at `n_scored` of them.

        6 for each weight of a matrix product and token, and attention uncut by causality (PaLM,
        appendix B): with n_scored = n_tokens the convention of nanoGPT and most published figures.
        """
        c = self.config
        head = c.vocab_size * c.n_embd  # of the embedding only its use as the head multiplies
        body = self.n_parameters() - head - self.transformer.wpe.weight.numel()
        # Scores and their sum over values: 2 products of 2 FLOPs, thrice for the backward pass.
        attention = 12 * c.n_layer * c.n_embd * c.block_size
        return n_tokens * (6 * body + attention) + n_scored * 6 * head
