"""
Every architecture of nanoSLM in one file.

How to read it: GPTConfig says what can be chosen. Each choice is a slot, one section below with its classes and its table.
Block puts one choice of each slot together, GPT stacks Blocks. No forward reads the config: choices are made in __init__.
`python model.py --attention=diff_mla` prints the configured model as data flows through it.

B batch   T new tokens   S tokens attended to (cached + new)   C channels (n_embd)   V vocabulary
H heads (n_head)   K key/value heads (n_kv_head)   D head width (head_dim)   R latent rank (kv_rank)   P rotary width (rope_dim)
N residual streams (n_stream)   M memory slots   G tokens of a memory segment

  slot        choice      class                          from
  norm        layernorm   LayerNorm                      Ba et al. 2016, arXiv:1607.06450
              rmsnorm     RMSNorm                        Zhang & Sennrich 2019, arXiv:1910.07467
  position    learned     Learned                        Radford et al. 2019 (GPT-2)
              rope        Rope                           Su et al. 2021, arXiv:2104.09864
              none        NoPosition                     Haviv et al. 2022, arXiv:2203.16634
  attention   mha         DenseHeads  x OneMap           Vaswani 2017; grouped: Ainslie et al. 2023, arXiv:2305.13245
              diff        DenseHeads  x DiffV1 | DiffV2  Ye et al. 2024, arXiv:2410.05258; V2: Microsoft, January 2026
              mla         LatentHeads x OneMap           DeepSeek-V2 2024, arXiv:2405.04434
              diff_mla    LatentHeads x DiffV1 | DiffV2  the two together; both of its halves are the papers'
  activation  gelu, relu2, silu, telu, crrelu            each named in kernels.py, activate
  glu         False, True MLP, GatedMLP                  Shazeer 2020, arXiv:2002.05202
  residual    plain       Plain                          He et al. 2015
              hyper       Hyper                          Zhu et al. 2024, arXiv:2409.19606
              mhc         Manifold                       Xie et al. 2025, arXiv:2512.24880; permutations: arXiv:2601.05732

  extra           class        where it lies                        in the line of
  thought_tokens  Thoughts     in front of the text                 registers, arXiv:2309.16588
  memory_slots    Memory       between two blocks                   Recurrent Memory Transformer, arXiv:2207.06881
  future_peek     Peek         between two blocks                   LEPTON's, with the future predicted and not read
  depths          Router       above the layers that it names       Mixture-of-Depths, arXiv:2404.02258
  n_ahead         Ahead        beside the trunk, for Speculation    Hydra, arXiv:2402.05109
  uncertainty     Uncertainty  beside the trunk
"""
import configurator # first: see stop_at_once there

import copy
import difflib
import hashlib
import itertools
import math
import os
import struct
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import (ACTIVATIONS, activate, few_rows, gated_pair, linear_cross_entropy, mhc_coefficients, mhc_gates, read_streams, rmsnorm,
                     rope_table, rotate, write_streams)


# ----------------------------------------------------------------------------------------------------------------------
# the configuration


@dataclass
class GPTConfig:
    block_size: int = 256 # longest context, in tokens
    vocab_size: int = 50304 # train.py sets it from the data; here GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 6 # number of blocks
    n_embd: int = 384 # channels C
    norm: str = "rmsnorm" # layernorm | rmsnorm
    position: str = "rope" # learned | rope | none
    rope_base: float = 10000.0 # slowest rotary wavelength is about 2 pi rope_base tokens
    attention: str = "mha" # mha | mla | diff | diff_mla
    n_head: int = 6 # heads H; with diff_form=v1 it counts the maps, two of which make one differential head
    n_kv_head: int = 0 # key/value heads of mha and diff: 0 = n_head, 1 = multi-query
    head_dim: int = 0 # width D of a head, rotary part included: 0 = n_embd // n_head
    qk_norm: bool = False # RMSNorm of queries and keys (of the query and the shared rotary key with mla and diff_mla)
    kv_rank: int = 0 # latent width R of mla and diff_mla, this is what gets cached: 0 = n_embd // 4
    q_rank: int = 0 # rank of the query projection of mla and diff_mla: 0 = direct
    rope_dim: int = 0 # rotary width P of mla and diff_mla, part of head_dim: 0 = head_dim // 2
    diff_form: str = "v2" # v1: lambda per layer, per-head norm (paper) | v2: lambda per token and head, doubled queries
    activation: str = "relu2" # gelu | relu2 | silu | telu | crrelu
    glu: bool = False # gate the MLP: down(act(gate x) * up x)
    mlp_hidden: int = 0 # MLP width: 0 = 4 C, or with glu 8/3 C rounded up to a multiple of 32 (equal parameters)
    residual: str = "plain" # plain | hyper | mhc
    n_stream: int = 0 # residual streams N of hyper and mhc: 0 = 4, as in both papers
    h_res: str = "sinkhorn" # how mhc makes its mixing matrix doubly stochastic: sinkhorn | permutations (a convex mix of all N!)
    sinkhorn_iters: int = 20 # of h_res=sinkhorn
    init_std: float = 0.0 # of initial weights: 0 = 1 / sqrt(n_in) in the blocks, a quarter of that outside; GPT-2 has 0.02
    zero_init: bool = False # start the residual projections at 0 (every block is the identity), not init_std / sqrt(2 n_layer)
    dropout: float = 0.0 # after the embedding and after each sublayer; never on attention weights
    bias: bool = False # biases in the projections around attention, in the MLP and in LayerNorm, as GPT-2
    tie_embeddings: bool = True # the head reuses the token embedding
    logit_softcap: float = 0.0 # logits become cap * tanh(logits / cap): 0 = off
    gradient_checkpointing: bool = False # recompute each block in backward: less memory, about a third more time
    thought_tokens: int = 0 # learned vectors in front of the text, which every token sees: 0 = off
    memory_slots: int = 0 # slots of a memory that each segment of the text writes and later ones read: 0 = off
    memory_segment: int = 0 # tokens that are written to memory together: 0 = block_size / 4
    document_token: int = -1 # the token at which memory is emptied; train.py takes it from the tokenizer: -1 = none
    future_peek: int = 0 # tokens to come whose mean is predicted, and the prediction given to the layers above: 0 = off
    depths: tuple = () # layers after which a token may be done, the last one n_layer: (2, 4, 8); () = all layers for all
    mean_depth: float = 0.0 # layers that a token is to take on average, with depths: 0 = halfway from the first to the last
    n_ahead: int = 0 # tokens beyond the next that a small cell learns to draft, for speculative decoding: 0 = off, 7 is usual
    uncertainty: bool = False # a small head learns how probable it is that the likeliest next token is wrong

    def __post_init__(self):
        self.depths = tuple(self.depths) if isinstance(self.depths, list) else self.depths # JSON makes lists of tuples
        for sentence in complaints(self):
            raise ValueError(sentence)

    # A knob left at 0 takes its usual value. The field keeps the 0, so that a copy with another n_embd follows.
    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_width(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def latent_rank(self):
        return self.kv_rank or self.n_embd // 4

    @property
    def is_latent(self):
        return self.attention in ("mla", "diff_mla")

    @property
    def is_diff(self):
        return self.attention in ("diff", "diff_mla")

    @property
    def rotary_width(self): # mla rotates a part of each head, the others all of it
        if self.position != "rope":
            return 0
        return (self.rope_dim or self.head_width // 2) if self.is_latent else self.head_width

    @property
    def streams(self):
        return (self.n_stream or 4) if self.residual != "plain" else 1

    @property
    def segment(self):
        return self.memory_segment or max(1, self.block_size // 4)

    @property
    def stage_depths(self): # layers above which the stages end, one stage without depths
        return self.depths or (self.n_layer,)

    @property
    def target_depth(self):
        return self.mean_depth or (self.stage_depths[0] + self.n_layer) / 2

    @property
    def middle(self): # the layer above which memory and future peek lie: all tokens are there, and have read each other
        return min(max(1, self.n_layer // 2), self.stage_depths[0])

    @property
    def hidden(self):
        return self.mlp_hidden or (math.ceil(8 * self.n_embd / 3 / 32) * 32 if self.glu else 4 * self.n_embd)


def complaints(c):
    """What a config must not be, each sentence with the way out; the first one is raised."""
    for slot, table in SLOTS.items():
        if getattr(c, slot) not in table:
            yield f"{slot}={getattr(c, slot)!r} is not known; choose one of: {', '.join(map(str, table))}"
            return # the rest takes the slots for granted
    for knob in ("block_size", "vocab_size", "n_layer", "n_embd", "n_head"):
        if getattr(c, knob) < 1:
            yield f"{knob}={getattr(c, knob)} must be at least 1"
    if type(c.depths) is not tuple or any(type(d) is not int for d in c.depths):
        yield f"depths={c.depths!r} must be whole numbers, as in (2, 4, 8)"
        return
    for knob in ("n_kv_head", "head_dim", "kv_rank", "q_rank", "rope_dim", "mlp_hidden", "init_std", "logit_softcap", "n_stream",
                 "thought_tokens", "memory_slots", "memory_segment", "future_peek", "mean_depth", "n_ahead"):
        if getattr(c, knob) < 0:
            yield f"{knob}={getattr(c, knob)} must not be negative; 0 is the default"
    if not 0 <= c.dropout < 1:
        yield f"dropout={c.dropout} must be in [0, 1)"
    if c.rope_base <= 1:
        yield f"rope_base={c.rope_base} must be above 1; 10000 is usual"
    if not c.head_dim and c.n_embd % c.n_head:
        yield f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}; change one of them or set head_dim"
    if c.n_head % c.kv_heads:
        yield f"n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}; choose a divisor"
    if c.is_diff and c.diff_form == "v1" and (c.n_head % 2 or c.kv_heads % 2):
        yield f"diff_form=v1 pairs heads: n_head={c.n_head} and n_kv_head={c.kv_heads} must be even; or use diff_form=v2"
    if c.zero_init and c.tie_embeddings:
        yield "zero_init with tie_embeddings starts as a model that repeats each token; set tie_embeddings=False"
    if c.rotary_width % 2:
        yield f"rotary width {c.rotary_width} must be even, it is turned in pairs; change rope_dim or head_dim"
    if c.is_latent and c.rotary_width > c.head_width - 2:
        yield f"rope_dim={c.rotary_width} must leave at least 2 of head_dim={c.head_width} unrotated; lower rope_dim"
    if c.is_latent and c.latent_rank < 1:
        yield f"n_embd={c.n_embd} leaves no latent of n_embd // 4 for attention={c.attention}; set kv_rank, or raise n_embd"
    if c.is_latent and (c.latent_rank % 2 or c.head_width % 2):
        yield f"kv_rank={c.latent_rank} and head_dim={c.head_width} must be even with attention={c.attention}: rotary pairs lie after them"
    if c.n_ahead >= c.block_size:
        yield f"n_ahead={c.n_ahead} must be below block_size={c.block_size}; 7 is usual"
    if c.memory_slots and (c.block_size // 2) % c.segment:
        yield f"memory_segment={c.segment} must divide half of block_size={c.block_size}: the window moves by halves; change one of them"
    if not -1 <= c.document_token < c.vocab_size:
        yield f"document_token={c.document_token} must be below vocab_size={c.vocab_size}; -1 is none"
    if c.future_peek >= c.block_size:
        yield f"future_peek={c.future_peek} must be below block_size={c.block_size}; 8 is usual"
    if c.depths and (sorted({*c.depths, c.n_layer}) != list(c.depths) or c.depths[0] < 1 or len(c.depths) < 2):
        yield f"depths={c.depths} must rise from at least 1 to n_layer={c.n_layer} in two numbers or more, as (2, 4, 8) does to n_layer=8"
    if c.depths and not c.depths[0] <= c.target_depth <= c.n_layer:
        yield f"mean_depth={c.mean_depth} must lie between {c.depths[0]} and {c.n_layer}, the first and the last of depths"
    if c.sinkhorn_iters < 1:
        yield f"sinkhorn_iters={c.sinkhorn_iters} must be at least 1; 20 is usual"
    if c.h_res == "permutations" and c.streams > 4:
        yield f"h_res=permutations has {c.streams}! terms with n_stream={c.streams}; use at most 4, or h_res=sinkhorn"
    # a knob whose owner is off would be ignored, which poisons comparisons
    usual = {f.name: f.default for f in fields(c)}
    for _, owned, sentence, knobs in OWNERS:
        for knob in knobs:
            if getattr(c, knob) != usual[knob] and not owned(c):
                yield f"{knob}={getattr(c, knob)} needs {sentence}; drop it or change that"


OWNERS = ( # fields that decide, whether they let the knobs count, what to choose so that they do, the knobs
    (("attention",), lambda c: c.is_latent, "attention=mla or diff_mla", ("kv_rank", "q_rank", "rope_dim")),
    (("attention",), lambda c: not c.is_latent, "attention=mha or diff: a latent serves all heads already", ("n_kv_head",)),
    (("attention",), lambda c: c.is_diff, "attention=diff or diff_mla", ("diff_form",)),
    (("position",), lambda c: c.position == "rope", "position=rope", ("rope_base", "rope_dim")),
    (("residual",), lambda c: c.residual != "plain", "residual=hyper or mhc", ("n_stream",)),
    (("residual",), lambda c: c.residual == "mhc", "residual=mhc", ("h_res", "sinkhorn_iters")),
    (("h_res",), lambda c: c.h_res == "sinkhorn", "h_res=sinkhorn", ("sinkhorn_iters",)),
    (("memory_slots",), lambda c: c.memory_slots, "memory_slots", ("memory_segment", "document_token")),
    (("depths",), lambda c: c.depths, "depths", ("mean_depth",)),
)


def without_orphans(chosen, typed):
    """
    chosen, the fields of a config {name: value}, without the knobs that a config file gave and that no longer count because a
    name in `typed`, which the command line gave, switched their owner. It says what it drops: `--attention=mha` after a file
    with a kv_rank should train, and not be refused for a knob that nobody typed.
    """
    usual = {f.name: f.default for f in fields(GPTConfig)}
    c = object.__new__(GPTConfig) # not checked yet
    c.__dict__.update(usual | chosen)
    orphans = {knob for deciding, owned, _, knobs in OWNERS for knob in knobs
               if typed.intersection(deciding) and chosen.get(knob, usual[knob]) != usual[knob] and not owned(c)} - typed
    for knob in sorted(orphans):
        print(f"{knob}={chosen[knob]} of the config file is dropped: it does not count with what the command line chose")
    return {name: value for name, value in chosen.items() if name not in orphans}


# ----------------------------------------------------------------------------------------------------------------------
# parameters: a few leaf classes own every weight. Each gives its initial values, its forward FLOPs per token, and what
# optim.py wants to know, so that nothing is decided by a name later:
#   role     matrix | embedding | head | gate | vector
#   fused    rows of the matrices that are stacked in this one (Muon orthogonalises each by itself)
#   blocks   rows of the blocks that share one second moment in Adam-mini: None = each row one, () = the whole tensor one


class Linear(nn.Linear):
    """y = x W^T (+ b). (..., n_in) -> (..., n_out). W ~ N(0, std), b = 0."""

    def __init__(self, n_in, n_out, bias, std, role="matrix", fused=None, blocks=None):
        self.std, self.role, self.fused, self.blocks = std, role, fused or (n_out,), blocks
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self): # called by nn.Linear.__init__
        nn.init.normal_(self.weight, std=self.std) if self.std else nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        return few_rows(x, self.weight, self.bias) # which leaves many rows to F.linear

    def flops(self, T):
        return 2 * self.in_features * self.out_features


class Embedding(nn.Embedding):
    """ids (..., ) -> (..., C). Rows ~ N(0, std)."""

    role = "embedding"

    def __init__(self, n, width, std):
        self.std = std
        super().__init__(n, width)

    def reset_parameters(self): # called by nn.Embedding.__init__
        nn.init.normal_(self.weight, std=self.std)


def outer_std(c):
    """Of embeddings and head: logits start with a spread of 0.25 whatever the width, within 0.1 nats of the uniform loss."""
    return c.init_std or 0.25 / math.sqrt(c.n_embd)


def linear(c, n_in, n_out, bias=False, **declared):
    """A projection inside a block. Its start follows the width: at 128 wide, 1/sqrt(n_in) reached 0.03 lower losses than half of it."""
    return Linear(n_in, n_out, bias, c.init_std or 1 / math.sqrt(n_in), **declared)


def residual_out(c, n_in):
    """The projection that writes into the residual stream. 2 n_layer of them add up, hence the smaller start (GPT-2)."""
    std = (c.init_std or 1 / math.sqrt(n_in)) / math.sqrt(2 * c.n_layer)
    return Linear(n_in, c.n_embd, c.bias, std=0.0 if c.zero_init else std)


def widen(x):
    """At least fp32: where half precision would lose what matters. fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------------------------------
# norm: (..., width) -> (..., width)


class LayerNorm(nn.Module):
    """y = (x - mean) / std * w (+ b)."""

    role = "vector"

    def __init__(self, width, bias=False, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.weight.shape, self.weight.type_as(x), bias, self.eps)


class RMSNorm(nn.Module):
    """y = x / rms(x) * w, rms(x) = sqrt(mean(x^2) + eps). No mean, no bias: `bias` is accepted for the slot's sake."""

    role = "vector"

    def __init__(self, width, bias=False, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rmsnorm(x, self.weight.type_as(x), self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head, (B, heads, T, D), with one gain for the query heads and one for the key heads. arXiv:2010.04245."""

    role = "vector"

    def __init__(self, heads, width, eps=1e-6):
        super().__init__()
        self.heads, self.eps = heads, eps # (query heads, key heads)
        self.weight = nn.Parameter(torch.ones(2, width))

    def forward(self, x):
        gain = torch.cat([w.expand(n, 1, -1) for w, n in zip(self.weight, self.heads)]) # (heads, 1, D)
        return rmsnorm(x.contiguous(), eps=self.eps) * gain.type_as(x)


NORM = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


# ----------------------------------------------------------------------------------------------------------------------
# position: (token embeddings, first position, vectors before them) -> (embeddings, table). By the table, Pass.turn turns what
# attention compares; it counts the vectors before the text from -1 down, so that they shift no token.


def positions(start, T, device):
    """Of T tokens: (T,) from the int `start`, or (B, 1, T) from the first position of each row, (B,)."""
    new = torch.arange(T, device=device)
    return start[:, None, None] + new if torch.is_tensor(start) else start + new


class Learned(nn.Module):
    """A trained vector per position, added to the token embedding."""

    def __init__(self, c):
        super().__init__()
        self.table = Embedding(c.block_size, c.n_embd, outer_std(c))

    def forward(self, h, start, before=0):
        m = positions(start, h.size(1), h.device).clamp(max=self.table.num_embeddings - 1) # a draft past the end is thrown away
        return h + self.table.weight[m].view(-1, *h.shape[1:]), None


class Rope(nn.Module):
    """
    Rotary embedding: pair i of a query or key at position m turns by the angle m base^(-2i/P), so a score depends on
    the distance of the two positions alone. Pairs are neighbours (2i, 2i+1) as in the paper, which makes the rotation
    one complex multiplication: fewer passes over memory in eager mode than rotating halves, and the same up to a
    permutation of the weights' rows (tests/test_parity.py has it).
    """

    def __init__(self, c):
        super().__init__()
        self.width, self.base = c.rotary_width, c.rope_base

    def forward(self, h, start, before=0):
        m = positions(start - before, before + h.size(1), h.device).to(widen(h[:0]).dtype)
        return h, rope_table(m, self.width, self.base) # (T, P/2, 2) or (B, 1, T, P/2, 2), for all layers


class NoPosition(nn.Module):
    """Causality alone tells a token where it is."""

    def __init__(self, c):
        super().__init__()

    def forward(self, h, start, before=0):
        return h, None


POSITION = {"learned": Learned, "rope": Rope, "none": NoPosition}


# ----------------------------------------------------------------------------------------------------------------------
# attention: forward(x, pass_) -> (B, T, C). Two questions, answered apart:
#   where do queries, keys and values come from?       DenseHeads: straight from x.  LatentHeads: through one small latent.
#   how do softmax maps become an output head?         OneMap: one map each.  DiffV1, DiffV2: the difference of two maps.
# Both sorts of heads give K key heads and K value heads of the same width D, so that flash kernels always fit.


def attend(q, k, v, mask=None, scale=None):
    """
    Causal softmax attention; the T queries are the last T of the S positions. q (B, H, T, D), k and v (B, K, S, D) with
    H a multiple of K (head h reads key head h // (H/K)) -> (B, H, T, D). mask (1 or B, 1, T, S): made once for all layers.
    scale: 1/sqrt(D) if not given.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None and T == S and T > 1: # training and whole prompts: the flash kernels' own causal mode, no mask in memory
        if H != K and not flash_takes_groups(q): # the unfused path would hold T x T scores: rather copy the keys
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != k.size(1))
    # New tokens after a cache; is_causal would align the mask top-left, which is wrong here. The H/K heads that share
    # a key head are stacked as more queries, so that the cached keys are read once and never copied.
    mask = causal_mask(T, S, q.device) if mask is None and T > 1 else mask
    mask = mask if mask is None or H == K else torch.cat([mask] * (H // K), dim=2) # repeat() takes 10 us longer
    o = F.scaled_dot_product_attention(q.reshape(B, K, H // K * T, D), k, v, attn_mask=mask, scale=scale)
    return o.reshape(B, H, T, D)


def causal_mask(T, S, device):
    """(1, 1, T, S): the T queries are the last of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


def flash_takes_groups(q):
    """Whether a fused kernel shares key heads by itself. On CUDA only flash and cuDNN do: half precision, from compute capability 8."""
    return not q.is_cuda or q.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(q.device) >= (8, 0)


class OneMap(nn.Module):
    """Ordinary attention: each query head is one softmax map, and one output head."""

    query_heads = 1 # per head of n_head
    value_halves = 1 # value heads of width D that an output head concatenates

    def __init__(self, c, layer):
        super().__init__()

    def attend(self, q, k, v, mask=None): # (B, H, T, D), 2 x (B, K, S, D) -> (B, maps, T, value_halves D)
        return attend(q, k, v, mask)

    def combine(self, o, x): # linear in o, so it works on latents as well as on values
        return o

    def finish(self, o): # (B, T, output heads, value_halves D)
        return o


class DiffV1(OneMap):
    """
    Differential attention as in the paper: (softmax_1 - lambda softmax_2) V, then RMSNorm per head, then (1 - lambda_init).
    Maps h and h + H/2 make output head h; its value, twice as wide, is value heads h and h + H/2 side by side. All weights
    keep the shapes of mha with the same n_head. lambda = exp(q1.k1) - exp(q2.k2) + lambda_init, one per layer (section 2.1).
    """

    role = "vector"
    value_halves = 2

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer) # layer counts from 0; the paper's l - 1
        self.vectors = nn.Parameter(0.1 * torch.randn(4, c.head_width)) # q1, k1, q2, k2
        self.eps = 1e-5

    def attend(self, q, k, v, mask=None):
        # One call for each half of the value keeps query, key and value widths equal, which the flash kernels ask for:
        # 8 D multiplications per pair of tokens instead of 6 D, and still faster than the unfused path.
        halves = [attend(q, k, torch.cat([half, half], dim=1), mask) for half in v.chunk(2, dim=1)]
        return torch.cat(halves, dim=-1)

    def combine(self, o, x): # (B, H, T, E) -> (B, H/2, T, E)
        q1, k1, q2, k2 = widen(self.vectors).unbind()
        lam = (q1 @ k1).exp() - (q2 @ k2).exp() + self.lambda_init
        first, second = widen(o).chunk(2, dim=1) # subtract in fp32: nearly equal numbers
        return (first - lam * second).type_as(o)

    def finish(self, o):
        return F.rms_norm(o, o.shape[-1:], eps=self.eps) * (1 - self.lambda_init)


class DiffV2(OneMap):
    """
    Second form: twice the query heads over unchanged keys and values; queries 2h and 2h+1 share a key head, and output
    head h is their difference with lambda = sigmoid(W x), one per token and head. No norm, no lambda_init.
    """

    query_heads = 2

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.gate = linear(c, c.n_embd, c.n_head, role="gate")

    def combine(self, o, x): # (B, 2H, T, E), (B, T, C) -> (B, H, T, E)
        lam = widen(self.gate(x)).sigmoid().transpose(1, 2).unsqueeze(-1) # (B, H, T, 1)
        first, second = widen(o).unflatten(1, (-1, 2)).unbind(2)
        return (first - lam * second).type_as(o)


DIFF_FORM = {"v1": DiffV1, "v2": DiffV2}


class DenseHeads(nn.Module):
    """Queries, keys and values straight from x. The cache holds K keys and K values of width D per token and layer."""

    def __init__(self, c, layer, maps):
        super().__init__()
        self.layer, self.maps = layer, maps
        self.D, self.K, self.Q = c.head_width, c.kv_heads, c.n_head * maps.query_heads # Q query heads
        q, k = self.Q * self.D, self.K * self.D # rows of queries; of keys, and of values
        per_head = (self.D,) * (self.Q + self.K) + (1,) * k # queries and keys by head, values by row
        self.qkv = linear(c, c.n_embd, q + 2 * k, c.bias, fused=(q, k, k), blocks=per_head)
        self.norm = HeadNorm((self.Q, self.K), self.D) if c.qk_norm else nn.Identity()
        self.out = residual_out(c, c.n_head * self.D)
        self.cache_layout = ((self.K, self.D), (self.K, self.D)) # heads, width of each cached tensor

    def forward(self, x, pass_):
        qk, v = self.qkv(x).unflatten(-1, (-1, self.D)).transpose(1, 2).split([self.Q + self.K, self.K], dim=1) # (B, heads, T, D)
        q, k = pass_.turn(self.norm(qk)).split([self.Q, self.K], dim=1) # both at once: half as many small operations
        k, v = pass_.remember(self.layer, k, v) # (B, K, S, D); a cached key keeps its own position
        o = self.maps.combine(self.maps.attend(q, k, v, pass_.mask), x)
        return self.out(self.maps.finish(o.transpose(1, 2)).flatten(2))

    def flops(self, T): # scores and mix over the whole context, not its causal half: the usual way to count
        return 2 * T * self.Q * self.D * (1 + self.maps.value_halves)


class LatentHeads(nn.Module):
    """
    Multi-head latent attention. x is pressed into c (R numbers, normed) and one rotary key r (P numbers) for all heads;
    these R + P numbers are all that is cached. Per head: key [W_uk c, r], value W_uv c, query [q_n, q_r].

    Two ways to the same result, the cheaper one is taken:
      expanded   makes keys and values of all S tokens, then attends as usual: training and long prompts;
      absorbed   scores q_n W_uk c as (q_n W_uk) c, mixes latents, and lifts only the mixture by W_uv: decoding. The maps
                 of a differential head are subtracted as latents, so each output head is lifted once.
    The softmax scale is 1/sqrt(D) in both. No norm may come between W_uk and the score: it could not be absorbed.
    """

    def __init__(self, c, layer, maps):
        super().__init__()
        self.layer, self.maps = layer, maps
        self.H, self.D, self.R, self.P = c.n_head, c.head_width, c.latent_rank, c.rotary_width
        self.N, self.Q = self.D - self.P, self.H * maps.query_heads # N unrotated width, Q query heads
        self.q_down = linear(c, c.n_embd, c.q_rank) if c.q_rank else nn.Identity()
        self.q_latent_norm = RMSNorm(c.q_rank) if c.q_rank else nn.Identity()
        self.q_up = linear(c, c.q_rank or c.n_embd, self.Q * self.D, blocks=(self.D,) * self.Q)
        self.kv_down = linear(c, c.n_embd, self.R + self.P)
        self.kv_norm = RMSNorm(self.R)
        # per head: N rows of W_uk, then D rows of W_uv
        self.kv_up = linear(c, self.R, self.H * (self.N + self.D), blocks=((self.N,) + (1,) * self.D) * self.H)
        self.norm_q, self.norm_r = (RMSNorm(w) if c.qk_norm and w else nn.Identity() for w in (self.D, self.P))
        self.out = residual_out(c, self.H * self.D)
        self.cache_layout = ((1, self.R + self.P),)

    def forward(self, x, pass_):
        q = self.norm_q(self.q_up(self.q_latent_norm(self.q_down(x))).unflatten(-1, (self.Q, self.D))) # (B, T, Q, D)
        q_n, q_r = q.transpose(1, 2).split([self.N, self.P], dim=-1) # (B, Q, T, N), (B, Q, T, P)
        c, r = self.kv_down(x).unsqueeze(1).split([self.R, self.P], dim=-1) # (B, 1, T, R), (B, 1, T, P)
        q_r, r = pass_.turn(q_r), pass_.turn(self.norm_r(r))
        (latent,) = pass_.remember(self.layer, torch.cat([self.kv_norm(c), r], dim=-1)) # (B, 1, S, R + P)
        attend_ = self.absorbed if self.absorbing_pays(x.size(1), latent.size(2)) else self.expanded
        return self.out(self.maps.finish(attend_(q_n, q_r, latent, x, pass_.mask)).flatten(2))

    def absorbing_pays(self, T, S):
        """Multiplications of both forms for T new tokens among S. A whole sequence (T = S) is best served by flash."""
        expanded = S * self.R * self.H * (self.N + self.D) + T * S * self.Q * 2 * self.D
        absorbed = T * self.R * (self.Q * self.N + self.H * self.D) + T * S * self.Q * 2 * (self.R + self.P)
        return (T == 1 or T < S) and absorbed < expanded

    def expanded(self, q_n, q_r, latent, x, mask):
        c, r = latent.split([self.R, self.P], dim=-1)
        k_n, v = self.kv_up(c.squeeze(1)).unflatten(-1, (self.H, -1)).transpose(1, 2).split([self.N, self.D], dim=-1) # (B, H, S, ...)
        k = torch.cat([k_n, r.expand(-1, self.H, -1, -1)], dim=-1)
        o = self.maps.attend(torch.cat([q_n, q_r], dim=-1), k, v, mask)
        return self.maps.combine(o, x).transpose(1, 2) # (B, T, output heads, E)

    def absorbed(self, q_n, q_r, latent, x, mask):
        w_uk, w_uv = self.kv_up.weight.unflatten(0, (self.H, -1)).split([self.N, self.D], dim=1) # (H, N, R), (H, D, R)
        q_c = torch.einsum("bhjtn,hnr->bhjtr", q_n.unflatten(1, (self.H, -1)), w_uk).flatten(1, 2) # (B, Q, T, R)
        # One key head for all queries. Values are the keys too, and the P last columns of the mixture are dropped: equal
        # widths, and the cache is used as it lies.
        o = attend(torch.cat([q_c, q_r], dim=-1), latent, latent, mask, scale=self.D**-0.5)[..., : self.R] # (B, Q, T, R)
        o = self.maps.combine(o, x) # (B, output heads, T, R)
        w_uv = w_uv.unflatten(0, (self.maps.value_halves, -1)) # value halves first: heads h and h + H/2 are one
        return torch.einsum("bhtr,ghdr->bthgd", o, w_uv).flatten(3) # (B, T, output heads, E)

    def flops(self, T):
        return 2 * T * self.Q * self.D * (1 + self.maps.value_halves)


ATTENTION = {
    "mha": lambda c, layer: DenseHeads(c, layer, OneMap(c, layer)),
    "mla": lambda c, layer: LatentHeads(c, layer, OneMap(c, layer)),
    "diff": lambda c, layer: DenseHeads(c, layer, DIFF_FORM[c.diff_form](c, layer)),
    "diff_mla": lambda c, layer: LatentHeads(c, layer, DIFF_FORM[c.diff_form](c, layer)),
}


# ----------------------------------------------------------------------------------------------------------------------
# activation and MLP: (B, T, C) -> (B, T, C)


class Activation(nn.Module):
    """A name of kernels.ACTIVATIONS, which has the formulas. crrelu learns one epsilon per layer from 0.01, as its paper."""

    role = "vector"

    def __init__(self, c):
        super().__init__()
        self.name = c.activation
        self.eps = nn.Parameter(torch.tensor([0.01])) if c.activation == "crrelu" else None

    def forward(self, x):
        return activate(x, self.name, self.eps if self.eps is None else self.eps[0])

    def pair(self, x):
        """act(gate) * up of gate and up side by side, (..., 2 F) -> (..., F)."""
        return gated_pair(x, self.name, self.eps if self.eps is None else self.eps[0])


class MLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, c):
        super().__init__()
        self.up = linear(c, c.n_embd, c.hidden, c.bias)
        self.activation = Activation(c)
        self.down = residual_out(c, c.hidden)

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(act(gate x) * up x): SwiGLU with silu, GEGLU with gelu. gate and up are one matrix, gate's rows first."""

    def __init__(self, c):
        super().__init__()
        self.gate_up = linear(c, c.n_embd, 2 * c.hidden, c.bias, fused=(c.hidden, c.hidden))
        self.activation = Activation(c)
        self.down = residual_out(c, c.hidden)

    def forward(self, x):
        return self.down(self.activation.pair(self.gate_up(x)))


GLU = {False: MLP, True: GatedMLP}


# ----------------------------------------------------------------------------------------------------------------------
# residual: what carries h from sublayer to sublayer. read gives a sublayer its input and `mix`, whatever write will need.
# Plain carries h (B, T, C); the others N streams (B, T, N, C), mixed anew around each sublayer. They start as the plain
# network: all streams are equal, each sublayer reads mostly one of them and writes to all. Which one it reads goes round
# with the layers: were all read alike, their gradients would be equal and the streams would stay copies for ever.


class Plain(nn.Module):
    """h + f(h)."""

    def __init__(self, c, sublayer):
        super().__init__()

    @staticmethod
    def expand(h, N): # before the first block: (B, T, C) -> the stream(s)
        return h

    @staticmethod
    def reduce(h): # after the last block: the stream(s) -> (B, T, C)
        return h

    def read(self, h):
        return h, None

    def write(self, h, y, mix):
        return h + y


class Streams(nn.Module):
    """
    X (B, T, N, C) -> X' = H_res X + H_post y, where the sublayer read sum_i H_pre[i] X_i. A class below makes the three
    coefficients of each token from X, in fp32: pre (B, T, N), post (B, T, N), res (B, T, N, N), indexed [out, in].
    """

    role = "vector"

    @staticmethod
    def expand(h, N):
        return h.unsqueeze(2).expand(-1, -1, N, -1).contiguous() # (B, T, N, C)

    @staticmethod
    def reduce(h):
        return h.mean(2) # the papers sum; the norm that follows does not see the difference

    def read(self, h):
        with without_autocast(h):
            pre, post, res = self.coefficients(widen(h))
            return read_streams(h, pre), (post, res)

    def write(self, h, y, mix):
        with without_autocast(h): # a product of matrices, which would be rounded to half precision
            return write_streams(h, y, *mix)

    def flops(self, T):
        return 2 * self.N * (self.N + 1) * self.C # H_pre X and H_res X


def without_autocast(x):
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type) # the meta device has none
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


class Hyper(Streams):
    """Hyper-connections: static coefficients, and for each stream a part tanh(norm(X) W) s of the token's own. Section 2.2."""

    def __init__(self, c, sublayer):
        super().__init__()
        self.N, self.C = N, C = c.streams, c.n_embd
        self.norm = NORM[c.norm](C)
        self.dynamic = Linear(C, N + 2, False, std=0.0, role="gate") # of each stream: to pre, to post, to the N outputs
        self.pre, self.post, self.res = nn.Parameter(torch.eye(N)[sublayer % N]), nn.Parameter(torch.ones(N)), nn.Parameter(torch.eye(N))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def coefficients(self, h):
        dynamic = F.linear(self.norm(h), self.dynamic.weight.type_as(h)).tanh() # h is fp32 where the weights are bf16
        pre, post, res = dynamic.split([1, 1, h.size(2)], dim=-1) # (B, T, N, 1 | 1 | N)
        s = self.scale
        return self.pre + s[0] * pre.squeeze(-1), self.post + s[1] * post.squeeze(-1), self.res + s[2] * res.mT # [out, in]

    def flops(self, T):
        return super().flops(T) + (self.N - 1) * self.dynamic.flops(T) # of each stream; one is counted with the Linear


class Manifold(Streams):
    """
    Manifold-constrained hyper-connections, section 4: H_pre = sigmoid, H_post = 2 sigmoid, H_res doubly stochastic, each of
    alpha * (norm(flat X) Phi) + b. alpha scales the token's own part alone. H_res neither grows nor shrinks what it mixes,
    through any number of layers.
    """

    def __init__(self, c, sublayer):
        super().__init__()
        self.N, self.C = N, C = c.streams, c.n_embd
        self.mixing = H_RES[c.h_res](c)
        self.widths = [N, N, len(self.mixing.start)]
        self.phi = Linear(N * C, sum(self.widths), False, std=0.0, role="gate")
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        read = torch.full((N,), 0.3 / max(1, N - 1)).index_fill(0, torch.tensor(sublayer % N), 0.7) # of equal streams: all of one
        self.b = nn.Parameter(torch.cat([read.logit(), torch.zeros(N), self.mixing.start]))

    def coefficients(self, h):
        return self.mixing(h, self.phi.weight, self.alpha, self.b)


class BySinkhorn(nn.Module):
    """Doubly stochastic (..., N, N) of N N logits: rows exactly, columns as far as the iterations get. Starts near I."""

    def __init__(self, c):
        super().__init__()
        self.iters, self.start = c.sinkhorn_iters, 3.0 * torch.eye(c.streams).flatten()

    def forward(self, h, phi, alpha, b): # -> pre, post (B, T, N), res (B, T, N, N)
        return mhc_coefficients(h, phi, alpha, b, self.iters)


class ByPermutations(nn.Module):
    """Doubly stochastic without iterations, and exact: the mean of all N! permutation matrices under softmax weights."""

    def __init__(self, c):
        super().__init__()
        orders = torch.tensor(list(itertools.permutations(range(c.streams)))) # (N!, N); the first is the identity
        self.register_buffer("matrices", torch.eye(c.streams)[orders], persistent=False)
        self.start = torch.zeros(len(orders))
        self.start[0] = 3.0 + math.log(len(orders) / c.streams) # as near to I as the other

    def forward(self, h, phi, alpha, b):
        pre, post, z = mhc_gates(h, phi, alpha, b) # (B, T, N), (B, T, N), (B, T, N!)
        return pre, post, (z.softmax(-1) @ self.matrices.flatten(1).type_as(z)).unflatten(-1, self.matrices.shape[1:])

    def flops(self, T):
        return 2 * self.matrices.numel()


H_RES = {"sinkhorn": BySinkhorn, "permutations": ByPermutations}
RESIDUAL = {"plain": Plain, "hyper": Hyper, "mhc": Manifold}

SLOTS = {"norm": NORM, "position": POSITION, "attention": ATTENTION, "diff_form": DIFF_FORM,
         "activation": ACTIVATIONS, "glu": GLU, "residual": RESIDUAL, "h_res": H_RES}


# ----------------------------------------------------------------------------------------------------------------------
# block, cache, and what one forward hands down


class Pass:
    """
    What belongs to one forward and to nothing else: made in GPT.trunk, handed down, then dropped. notes: what the losses beside
    the model's own will ask for, name -> tensor.
    """

    def __init__(self, idx, table=None, cache=None, before=0, windows=1, notes=None, last=0):
        self.idx, self.windows = idx, windows # (B, windows T): the text; h is (B windows, before + T, C), a row for each window
        self.before = before # places in front of the text in h: the thoughts, with the first tokens
        self.table, self.cache, self.notes = table, cache, {} if notes is None else notes
        self.start = 0 if cache is None else cache.length # tokens before these
        self.stage, self.last = 0, last # of depths: where it is, and where it ends
        self.real = None # which of these tokens are no padding, None: all
        self.mask = None if cache is None else cache.mask(before + idx.size(1)) # what each query sees, where it is not all before it

    def turn(self, x):
        """Queries or keys (B, heads, T, D), turned to their positions."""
        return x if self.table is None else rotate(x, self.table)

    def remember(self, layer, *new):
        """New keys, values or latents (B, heads, T, width) -> the same of all S tokens, the cached ones in front."""
        return new if self.cache is None else self.cache.append(layer, self.cache.filled(self.stage), *new)

    def text(self, x):
        """(B windows, before + T, C) -> (B, windows T, C)."""
        return x[:, self.before :].unflatten(0, (-1, self.windows)).flatten(1, 2)

    def folded(self, x):
        """The way back: nothing for the places in front."""
        return F.pad(x.unflatten(1, (self.windows, -1)).flatten(0, 1), (0, 0, self.before, 0))

    def deeper(self, T, order=None, real=None):
        """For the T' tokens that go on: order (B, T') their places among these, None: all. real (B, T'): False where a row has fewer."""
        new = copy.copy(self)
        new.stage, new.real = self.stage + 1, real
        if self.table is not None and order is not None: # positions of their own
            table = self.table.squeeze(1) if self.table.dim() == 5 else self.table.expand(len(order), *self.table.shape)
            new.table = table[torch.arange(len(order), device=order.device)[:, None], order].unsqueeze(1) # (B, 1, T', P/2, 2)
        if self.cache is not None:
            new.mask = self.cache.mask(T, new.stage)
        return new


class Cache:
    """
    What attention keeps of the tokens it has read: for each layer the tensors that its cache_layout lists, (B, heads,
    before + capacity, width): the vectors before the text, which come with the first tokens, then `length` tokens: an int, or
    a tensor (B,) where rows differ. Rolling back is setting the length: what lies beyond it counts for nothing.

    Layers of a later stage (depths) hold the tokens that reached it. lengths[i] is the length of stage i; setting `length` sets
    them all, by reached[i][b][t]: how many of the first t tokens of row b in stage i went on. It is kept on the host, which must
    know before the next layer. memory (B, heads, segments + 1, slots, width) or None: what it held when each segment began.
    """

    def __init__(self, layouts, batch_size, capacity, dtype, device, before=0, stages=1, memory=()):
        # zeros: a row that is behind the others masks what lies ahead of it, but 0 times a NaN would be NaN
        self.layers = [[torch.zeros(batch_size, heads, before + capacity, width, dtype=dtype, device=device) for heads, width in layout]
                       for layout in layouts]
        self.capacity, self.before, self.lengths, self.device = capacity, before, [0] * stages, device
        self.reached = [[[0] for _ in range(batch_size)] for _ in range(stages - 1)]
        self.memory = None
        if memory:
            heads, self.segment, slots, width = memory
            self.memory = torch.zeros(batch_size, heads, capacity // self.segment + 1, slots, width, device=device,
                                      dtype=torch.promote_types(dtype, torch.float32))

    @property
    def length(self):
        return self.lengths[0]

    @length.setter
    def length(self, n):
        self.lengths[0] = n
        for stage, reached in enumerate(self.reached):
            counts = [row[m] for row, m in zip(reached, self.of_rows(stage))]
            self.lengths[stage + 1] = torch.tensor(counts, device=self.device) if len(set(counts)) > 1 else sum(counts[:1])

    def of_rows(self, stage):
        """The length of each row."""
        n = self.lengths[stage]
        return n.tolist() if torch.is_tensor(n) else itertools.repeat(n)

    def part(self, rows):
        """An empty cache for these rows (a slice), which lies in this one: what is read into it is there afterwards."""
        part = copy.copy(self)
        part.layers, part.reached = [[store[rows] for store in layer] for layer in self.layers], [r[rows] for r in self.reached]
        part.lengths, part.memory = [0] * len(self.lengths), None if self.memory is None else self.memory[rows]
        return part

    def longest(self):
        return int(self.length.max()) if torch.is_tensor(self.length) else self.length

    def filled(self, stage=0):
        """Places taken: an int, or (B,)."""
        begun = torch.is_tensor(self.length) or self.length
        return self.before + self.lengths[stage] if begun else 0

    def append(self, layer, filled, *new):
        T, many = new[0].size(2), torch.is_tensor(filled)
        end = T + (int(filled.max()) if many else filled)
        for store, x in zip(self.layers[layer], new):
            if many: # each row at its own place
                rows, at = torch.arange(len(x), device=x.device)[:, None], filled[:, None] + torch.arange(T, device=x.device)
                store[rows, :, at] = x.transpose(1, 2).to(store.dtype)
            else:
                store[:, :, filled:end] = x
        return [store[:, :, :end] for store in self.layers[layer]]

    def note(self, stage, went):
        """Of the new tokens of this stage, which went on: a list of each row's."""
        for row, start, new in zip(self.reached[stage], self.of_rows(stage), went):
            row[start:] = itertools.accumulate(new, initial=row[start])

    def mask(self, T, stage=0):
        """(1 or B, 1, T, S), whether each of T new tokens sees each of S; None for a single token, and for the first ones: all causal."""
        filled = self.filled(stage)
        if not torch.is_tensor(filled):
            return causal_mask(T, filled + T, self.device) if 0 < filled and T > 1 else None
        new, every = (torch.arange(n, device=filled.device) for n in (T, int(filled.max()) + T))
        return every <= filled[:, None, None, None] + new[:, None]

    def truncate(self, n):
        """Forget all but the first n tokens; n an int, or a tensor (B,) for rows of their own. ValueError if there are not as many."""
        n = n.to(self.device) if torch.is_tensor(n) and n.dim() else int(n)
        if (torch.as_tensor(n, device=self.device) < 0).any() or (torch.as_tensor(n, device=self.device) > self.length).any():
            raise ValueError(f"cannot keep {n} of {self.length} cached tokens")
        self.length = 0 if torch.is_tensor(n) and not n.any() else n # of nothing: the vectors before the text come again

    def slide(self, n):
        """Forget all tokens. A memory stays, as it was after the first n."""
        if self.memory is not None:
            self.memory[:, :, 0] = self.memory[:, :, n // self.segment]
        self.length = 0

    def nbytes(self):
        """Bytes allocated, as the tensors themselves report them; for its full capacity, whatever the length."""
        return sum(store.nbytes for layer in self.layers for store in layer) + (0 if self.memory is None else self.memory.nbytes)


class Block(nn.Module):
    """Pre-norm: attention, then the MLP, each reading from and writing to the residual stream."""

    def __init__(self, c, layer):
        super().__init__()
        self.residual1, self.residual2 = RESIDUAL[c.residual](c, 2 * layer), RESIDUAL[c.residual](c, 2 * layer + 1)
        self.norm1, self.attention = NORM[c.norm](c.n_embd, c.bias), ATTENTION[c.attention](c, layer)
        self.norm2, self.mlp = NORM[c.norm](c.n_embd, c.bias), GLU[c.glu](c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, pass_):
        x, mix = self.residual1.read(h)
        h = self.residual1.write(h, self.dropout(self.attention(self.norm1(x), pass_)), mix)
        x, mix = self.residual2.read(h)
        return self.residual2.write(h, self.dropout(self.mlp(self.norm2(x))), mix)


class CheckpointedBlock(Block):
    """Keeps only its input for backward and computes the rest again."""

    def forward(self, h, pass_):
        if not torch.is_grad_enabled() or pass_.cache is not None: # computing again would write the cache again
            return super().forward(h, pass_)
        return checkpoint(super().forward, h, pass_, use_reentrant=False)


# ----------------------------------------------------------------------------------------------------------------------
# extras around and inside the trunk. Where one has a loss(model, h, idx, targets, notes), that trains it, beside the model's own.


class Thoughts(nn.Module):
    """
    K learned vectors in front of the text: every token attends to them, they attend to each other, none is ever predicted.
    Registers of a transformer (Darcet et al. 2023, arXiv:2309.16588), for text. They depend on nothing that is read, so they
    leak nothing, and a cache holds them once.
    """

    role = "embedding"

    def __init__(self, c):
        super().__init__()
        self.vectors = nn.Parameter(outer_std(c) * torch.randn(c.thought_tokens, c.n_embd))

    def forward(self, h): # (B, T, C) -> (B, K + T, C)
        return torch.cat([self.vectors.expand(h.size(0), -1, -1).type_as(h), h], dim=1)


class Between(nn.Module):
    """One more sublayer, between two blocks: h + body(norm(h)) on whatever streams there are."""

    def __init__(self, c, body, sublayer):
        super().__init__()
        self.residual, self.norm, self.body = RESIDUAL[c.residual](c, sublayer), NORM[c.norm](c.n_embd, c.bias), body
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, pass_):
        x, mix = self.residual.read(h)
        return self.residual.write(h, self.dropout(self.body(self.norm(x), pass_)), mix)


class Memory(nn.Module):
    """
    Attention to the text beyond the window, through M slots. At the end of each segment of G tokens, slot m with its learned
    query s_m looks over them, and over what it holds:

        w = softmax([keep_m, s_m k_1, ..., s_m k_G])        slot m = w_0 slot m + sum_i w_i [k_i, v_i]

    Tokens of later segments attend to the slots, as to M tokens, and to `nothing`, whose value is 0 and whose weight is the gate.
    Keys and values are read at unit size: what was written with a small w speaks as loudly.
    So the memory of a text is a function of that text alone: nothing is stored on the module. At document_token it is emptied.
    In the line of the Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881), whose slots pass through all layers.
    """

    role = "vector"

    def __init__(self, c):
        super().__init__()
        self.H, self.D, self.M, self.G = c.n_head, c.head_width, c.memory_slots, c.segment
        self.layer, self.document = c.n_layer, c.document_token # its place in the cache, after the blocks
        width = self.H * self.D
        self.qkv = linear(c, c.n_embd, 3 * width, c.bias, fused=(width,) * 3, blocks=(self.D,) * (2 * self.H) + (1,) * width)
        # Both starts decide whether recall is learned (bench.py, memory): sharp queries, so that a slot takes few tokens and not
        # the mean of all; and slots that keep nearly nothing beside slots that keep nearly all from segment to segment.
        self.slots = nn.Parameter(3 * torch.randn(self.H, self.M, self.D))
        self.keep = nn.Parameter(math.log(self.G) + torch.linspace(-1, 4, self.M).repeat(self.H, 1))
        self.nothing = nn.Parameter(torch.zeros(self.H, 1, self.D))
        self.out = residual_out(c, width)
        self.cache_layout = ((self.H, self.D), (self.H, self.D), (1, 1)) # keys, values, where documents begin
        self.memory_layout = (self.H, self.G, self.M, 2 * self.D)

    def forward(self, x, pass_):
        q, k, v = self.qkv(pass_.text(x)).unflatten(-1, (-1, self.D)).transpose(1, 2).chunk(3, dim=1) # (B, H, T, D)
        begins = (pass_.idx == self.document)[:, None, :, None].type_as(k) # (B, 1, T, 1)
        if pass_.cache is not None:
            k, v, begins = pass_.cache.append(self.layer, pass_.start, k, v, begins) # (B, ., S, .)
        begins = begins[:, 0, :, 0]
        first, memory = self.write(k, v, begins, pass_)
        return pass_.folded(self.out(self.read(q, memory, first, begins, pass_)))

    def write(self, k, v, begins, pass_):
        """-> the first segment with a new token; what memory holds when each from there on begins, (B, H, n + 1, M, 2D): n end here."""
        G, start, cache = self.G, pass_.start, pass_.cache
        first, end = (int(start.min()) if torch.is_tensor(start) else start) // G, k.size(2) // G
        state = k.new_zeros(len(k), self.H, self.M, 2 * self.D, dtype=widen(k[:0]).dtype) if cache is None else cache.memory[:, :, first]
        states = [state]
        if end > first:
            kv = torch.cat([k, v], dim=-1)[:, :, first * G : end * G].unflatten(2, (-1, G)) # (B, H, n, G, 2D)
            score = torch.einsum("hmd,bhngd->bhnmg", self.slots.type_as(k), kv[..., : self.D]) / math.sqrt(self.D)
            begins = begins[:, None, first * G : end * G].unflatten(2, (-1, 1, G)) # (B, 1, n, 1, G)
            after = begins.flip(-1).cumsum(-1).flip(-1) - begins # documents that begin after a token: it is not of the last one
            keep = self.keep[:, None, :, None].expand(*score.shape[:-1], 1)
            w = torch.cat([keep.masked_fill(begins.sum(-1, keepdim=True) > 0, -torch.inf),
                           widen(score).masked_fill(after > 0, -torch.inf)], dim=-1).softmax(-1) # (B, H, n, M, 1 + G)
            new = w[..., 1:] @ widen(kv) # (B, H, n, M, 2D)
            for n in range(end - first):
                states.append(w[:, :, n, :, :1] * states[-1] + new[:, :, n])
        memory = torch.stack(states, dim=2)
        if cache is not None:
            cache.memory[:, :, first : end + 1] = memory
        return first, memory

    def read(self, q, memory, first, begins, pass_):
        """Each token attends to what the memory held when its segment began, if no document has begun since. -> (B, T, H D)."""
        (B, H, T, _), n = q.shape, memory.size(2)
        at = positions(pass_.start, T, q.device).reshape(-1, T) # (1 or B, T)
        counts = F.pad(begins.cumsum(1, dtype=torch.long), (1, 0)).expand(B, -1) # documents begun before each token; bf16 counts to 256
        here, segment = counts.gather(1, (at + 1).expand(B, T)), counts.gather(1, (at // self.G * self.G).expand(B, T))
        mask = (at // self.G - first)[..., None] == torch.arange(n, device=q.device).repeat_interleave(self.M) # (1 or B, T, n M)
        mask = F.pad(mask & (here == segment)[..., None], (1, 0), value=True)[:, None] # (B, 1, T, 1 + n M)
        k, v = rmsnorm(memory.flatten(2, 3).unflatten(-1, (2, self.D))).type_as(q).unbind(3) # (B, H, n M, D)
        k = torch.cat([self.nothing.type_as(q).expand(B, -1, -1, -1), k], dim=2)
        o = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 0, 1, 0)), attn_mask=mask)
        return o.transpose(1, 2).flatten(2)

    def flops(self, T): # as if each token looked at M slots, and each slot at each token
        return 4 * self.H * self.D * self.M + 2 * self.H * self.D * 3 * self.M


class Peek(nn.Module):
    """
    A hint about the next n tokens, predicted from the past: their mean embedding (each of unit size) as an MLP sees it coming.
    Its own loss trains the prediction against what really came, to which no gradient flows; what the layers above get is the
    prediction, gated, and nothing of the future.
    """

    def __init__(self, c):
        super().__init__()
        self.n = c.future_peek
        self.up, self.down = linear(c, c.n_embd, 2 * c.n_embd), linear(c, 2 * c.n_embd, c.n_embd)
        self.gate, self.out = linear(c, c.n_embd, 1, role="gate"), residual_out(c, c.n_embd)

    def forward(self, x, pass_):
        hint = self.down(activate(self.up(x), "relu2"))
        pass_.notes["peek"] = pass_.text(hint) # (B, T, C)
        return self.gate(x).sigmoid() * self.out(hint.detach())

    def loss(self, model, h, idx, targets, notes):
        """Squared error over the mean square of what was to be predicted: 1 for a prediction that says nothing, 0 for a perfect one."""
        real = (targets >= 0).unsqueeze(-1) # (B, T, 1)
        e = F.rms_norm(widen(model.embed.weight.detach()), (h.size(-1),))[targets.clamp(min=0)] * real # (B, T, C)
        sums = F.pad(torch.cat([e, real.type_as(e)], dim=-1), (0, 0, 0, self.n - 1)).unfold(1, self.n, 1).sum(-1) # (B, T, C + 1)
        count = sums[..., -1:]
        mean = sums[..., :-1] / count.clamp(min=1)
        off = (widen(notes["peek"])[:, : idx.size(1)] - mean) * (count > 0)
        return off.square().sum() / mean.square().sum().clamp(min=1e-6)


class Router(nn.Module):
    """
    Lets each token decide, from its own state alone, whether it is done or goes on to the next stage of layers: by the same
    rule, score > 0, in training and in decoding. The others are gathered, so what is skipped is not computed; they keep their
    positions, and there attend to each other only. What a stage adds is multiplied by p = sigmoid(score), which is how the
    score hears of the loss; the mean depth is held by a loss of its own, through the same sigmoid (straight-through).
    In the line of Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258), whose top-k over the sequence is not causal.
    """

    def __init__(self, c, stage):
        super().__init__()
        self.reduce, (here, beyond) = RESIDUAL[c.residual].reduce, c.stage_depths[stage : stage + 2]
        self.layers, self.first, self.target = beyond - here, c.stage_depths[0], c.target_depth
        self.norm, self.gate = NORM[c.norm](c.n_embd, c.bias), linear(c, c.n_embd, 1, True, role="gate")

    def forward(self, h, pass_, through):
        """h (B, T, ...) after one stage -> after all. through(h, pass_) is what the tokens that go on are put through."""
        x, before = self.reduce(h), pass_.before
        score = self.score(x) # (B, T)
        go = score > 0 if pass_.real is None else (score > 0) & pass_.real
        went = [[True] * go.size(1)] * len(go) if go.is_meta else go.tolist() # on the host: shapes depend on it
        if pass_.cache is None:
            pass_.notes["depth"] = pass_.notes.get("depth", self.first) + self.layers * self.share(x, go, pass_)
        else:
            pass_.cache.note(pass_.stage, [row[before:] for row in went])
        if before:
            go = go | (torch.arange(go.size(1), device=go.device) < before) # thoughts are there for all
        counts = [sum(row[before:]) + before for row in went]
        most = max(counts, default=0)
        if most == 0:
            return h
        p = score.sigmoid()
        if most == go.size(1) and len(go) == 1: # a single row, all of which goes on: nothing to gather
            return torch.lerp(h, through(h, pass_.deeper(most)), like(p, h))
        order = go.sort(dim=1, descending=True, stable=True).indices[:, :most] # those that go on, in their order, then others
        rows = torch.arange(len(go), device=go.device)[:, None]
        real = torch.arange(most, device=go.device) < torch.tensor(counts, device=go.device)[:, None]
        few = h[rows, order] # (B, T', ...)
        deep = through(few, pass_.deeper(most, order, real))
        return h.index_put((rows, order), torch.lerp(few, deep, like(p[rows, order] * real, h)))

    def score(self, x):
        return widen(self.gate(self.norm(x))).squeeze(-1)

    def share(self, x, go, pass_):
        """Of the text's tokens, the share that goes on. Its gradient is that of the sigmoid, and moves the router alone."""
        soft = self.score(x.detach()).sigmoid() if torch.is_grad_enabled() else go.float()
        share = (go + soft - soft.detach())[:, pass_.before :]
        return (share if pass_.real is None else share * pass_.real[:, pass_.before :]).sum() / pass_.idx.numel()

    def loss(self, model, h, idx, targets, notes):
        """Squared distance of the mean depth from the one asked for, in layers."""
        return (notes["depth"] - self.target).square()


def own_randomness():
    """A context that ends with the random state that it began with."""
    device = torch.get_default_device()
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def like(p, h):
    """(B, T) -> (B, T, 1, ...), in the dtype of h."""
    return p.view(*p.shape, *[1] * (h.dim() - 2)).type_as(h)


_AHEAD_LOGITS = 2**22 # of the cell that are in memory at a time, 16 MB in each of about six forms


class Ahead(nn.Module):
    """
    Guesses the tokens after the next from h_t (C), the trunk's output, and the tokens in between: s_0 = h_t, and with each
    further token s_i = s_(i-1) + W_down relu2(W_up [norm s_(i-1), norm e(x_(t+i))]), of which the model's own head reads
    x_(t+i+1). One cell for all i: a chain of heads, each fed with what the one before wrote, hits 0.75 of the model's
    probability four tokens on, where independent heads (Medusa, arXiv:2401.10774) hit 0.3. It is trained half as deep as it
    drafts: trained 4 and 6 deep, as many of 8 drafts are kept. Nothing but the cell is trained: the trunk, the embedding and the
    head are detached. In the line of Hydra (Ankner et al. 2024, arXiv:2402.05109). The norms have no gains: W_up has them.
    """

    detached = True # learns from detached numbers: optim.py and train.py keep its parameters apart from the model's

    def __init__(self, c):
        super().__init__()
        self.depth, self.head_flops = (c.n_ahead + 1) // 2, 2 * c.n_embd * c.vocab_size
        self.up = linear(c, 2 * c.n_embd, 4 * c.n_embd)
        self.down = Linear(4 * c.n_embd, c.n_embd, False, std=0.0)

    def forward(self, s, e): # (..., C), (..., C) -> (..., C)
        times = F.linear if torch.is_grad_enabled() else few_rows # not the modules: of a draft's 50 us their calls would be 8
        return s + times(F.relu(times(rmsnorm(torch.stack([s, e], dim=-2)).flatten(-2), self.up.weight)).square(), self.down.weight)

    def loss(self, model, h, idx, targets, notes):
        """
        Mean cross-entropy, in nats, against the model's own distribution at the positions after this one, by which drafts will be
        judged: of 8 drafts 2.3 are kept, not the 1.9 of a cell that learns the text's tokens (frozen trunk, one seed). On a quarter
        of the rows: a step then takes 1.18 times as long as without the cell.
        """
        few = max(1, len(h) // 4)
        h, idx, targets = h[:few].detach(), idx[:few], targets[:few]
        s, guesses, counts = h, [], []
        for i in range(1, min(self.depth, idx.size(1) - 1) + 1):
            s = self(s[:, :-1], F.embedding(idx[:, i:], model.embed.weight.detach()))
            guesses.append(F.pad(s, (0, 0, i, 0))) # to where the model itself says what it guesses
            counts.append(F.pad(targets[:, i:] >= 0, (i, 0)))
        if not guesses:
            return h.new_zeros(())
        h, guesses, counts = h.flatten(0, 1), torch.stack(guesses, dim=2).flatten(0, 1), torch.stack(counts, dim=2).flatten(0, 1)
        rows = max(1, _AHEAD_LOGITS // (self.depth * model.config.vocab_size)) # at a time; their logits are made again in backward
        parts = zip(*(t.split(rows) for t in (h, guesses, counts)))
        return sum(checkpoint(self.apart, model, *part, use_reentrant=False) for part in parts) / counts.sum().clamp(min=1)

    @staticmethod
    def apart(model, h, guesses, counts): # (rows, C), (rows, n, C), (rows, n) -> ()
        want, got = (model.cap(widen(F.linear(t, model.head.weight.detach()))) for t in (h.unsqueeze(1), guesses)) # (rows, 1 | n, V)
        return -((want.softmax(-1) * got.log_softmax(-1)).sum(-1) * counts).sum()

    def flops(self, T): # on a quarter of the tokens `depth` cells and heads, and the model's head; less the one cell that Linears count
        cell = self.up.flops(T) + self.down.flops(T)
        return (self.depth * (cell + self.head_flops) + self.head_flops) // 4 - cell


class Uncertainty(nn.Module):
    """
    The score: sigmoid(z), the probability that the token with the largest logit is not the one that follows, of text like that
    trained on: where it says 0.3, about 3 of 10 such guesses should be wrong. It judges the model's first guess, at temperature 1,
    whatever token is then drawn. z = log((1 - p) / p) + k, p the softmax's largest probability: at first it says 1 - p, the usual
    measure, and learns the correction k = W_down gelu(W_up h) from the trunk's output h. Both come in detached. So far it does
    not beat 1 - p on new text (python bench.py uncertainty): what it learns on is text that the trunk has learned too.
    """

    detached = True # as Ahead
    PRIOR = 0.1 # times k^2 is what a correction costs; with none, AUROC on new text falls by 0.0024 below that of 1 - p, with it by 0.0004

    def __init__(self, c):
        super().__init__()
        self.head_flops = 2 * c.n_embd * c.vocab_size
        self.up = linear(c, c.n_embd, max(1, c.n_embd // 2), bias=True, role="gate") # which sparse training and Muon leave alone
        self.down = Linear(self.up.out_features, 1, True, std=0.0, role="gate")

    def forward(self, h, logits): # (..., C), (..., V) -> z (...), k (...)
        log_p = logits.detach().log_softmax(-1).amax(-1).clamp(max=-1e-6) # a p of 1 would be infinitely sure, and stay so
        k = widen(self.down(activate(self.up(h.detach()), "gelu"))).squeeze(-1)
        return (-log_p.expm1()).log() - log_p + k, k

    def loss(self, model, h, idx, targets, notes):
        """Mean over a quarter of the rows of the cross-entropy of "the largest logit is not the target's", in nats, and PRIOR k^2."""
        few = len(h) // 4 or len(h)
        h, targets = h[:few], targets[:few]
        with torch.no_grad():
            logits = model.logits(h)
        z, k = self(h, logits)
        known, wrong = (targets >= 0).type_as(z), (logits.argmax(-1) != targets).type_as(z)
        terms = F.binary_cross_entropy_with_logits(z, wrong, reduction="none") + self.PRIOR * k.square()
        return (terms * known).sum() / known.sum().clamp(min=1)

    def flops(self, T): # on a quarter of the tokens, the model's head without its backward; less what Linears count themselves
        own = self.up.flops(T) + self.down.flops(T)
        return (own + self.head_flops // 3) // 4 - own


BETWEEN = {"memory_slots": Memory, "future_peek": Peek} # knob: what lies between two blocks
EXTRAS = {"ahead": ("n_ahead", Ahead), "uncertainty": ("uncertainty", Uncertainty)} # name of the loss: (knob, class), after the trunk


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """
    logits, losses = model(idx, targets). idx (B, T) int64, T <= block_size; with a memory and no cache any T, read as windows of
    block_size that only memory connects. With targets (B, T; -1 is ignored): logits
    (B, T, V) and losses {"ce": nats per token}. Without: logits (B, 1, V) of the last token and {}. With a cache: idx are
    the tokens that follow, logits (B, T, V). Logits are fp32 (fp64 for a model in double). with_logits=False gives None for
    them and the same losses, without ever holding all of them: what training needs.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.block_size = c.block_size
        self.embed = Embedding(c.vocab_size, c.n_embd, outer_std(c))
        self.position = POSITION[c.position](c)
        self.thoughts, self.before = Thoughts(c) if c.thought_tokens else nn.Identity(), c.thought_tokens
        self.dropout = nn.Dropout(c.dropout)
        self.streams, self.n_stream = RESIDUAL[c.residual], c.streams
        self.blocks = nn.ModuleList((CheckpointedBlock if c.gradient_checkpointing else Block)(c, i) for i in range(c.n_layer))
        self.between = nn.ModuleList(Between(c, make(c), 2 * c.n_layer + i)
                                     for i, (knob, make) in enumerate(BETWEEN.items()) if getattr(c, knob))
        self.routers = nn.ModuleList(Router(c, i) for i in range(len(c.stage_depths) - 1))
        bottom = [*self.blocks[: c.middle], *self.between, *self.blocks[c.middle : c.stage_depths[0]]]
        self.stages = [bottom, *(list(self.blocks[a:b]) for a, b in itertools.pairwise(c.stage_depths))]
        self.norm = NORM[c.norm](c.n_embd, c.bias)
        self.head = Linear(c.n_embd, c.vocab_size, False, outer_std(c), role="head")
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.softcap = c.logit_softcap
        self.cap = partial(softcap, c.logit_softcap) if c.logit_softcap else nn.Identity()
        with own_randomness(): # else their initial values would move the dropout of the model that they must leave alone
            self.extras = nn.ModuleDict({name: make(c) for name, (knob, make) in EXTRAS.items() if getattr(c, knob)})
        inside = {"peek": next((b.body for b in self.between if isinstance(b.body, Peek)), None),
                  "depth": self.routers[0] if c.depths else None}
        self.beside = {**{name: part for name, part in inside.items() if part}, **self.extras} # who has a loss

    def forward(self, idx, targets=None, cache=None, with_logits=True):
        if not with_logits and targets is None:
            raise ValueError("with_logits=False leaves nothing to return without targets; give targets")
        notes = {}
        h = self.trunk(idx, cache, notes)
        if cache is None and targets is None:
            h = h[:, -1:] # all that sampling needs
        logits = self.logits(h) if with_logits else None
        if targets is None:
            return logits, {}
        ce = (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1) if with_logits else
              linear_cross_entropy(h, self.head.weight, targets, self.softcap))
        beside = self.beside.items() if self.training else () # what trains them is of no use elsewhere
        return logits, {"ce": ce, **{name: part.loss(self, h, idx, targets, notes) for name, part in beside}}

    def trunk(self, idx, cache=None, notes=None, shallow=False):
        """
        (B, T) -> (B, T, C): what the head reads. notes: a dict, filled with what Pass.notes says. shallow: as if every token were
        done after the first of depths; needs a cache, and what that leaves in it is to be forgotten (Speculation.early).
        """
        if idx.dim() != 2 or not idx.size(1):
            raise ValueError(f"idx {tuple(idx.shape)} must be (B, T) with at least one token")
        T, start = idx.size(1), cache.length if cache is not None else 0
        longest, room = (T, self.block_size) if cache is None else (cache.longest() + T, cache.capacity)
        windows = 1
        if cache is None and self.memory is not None and T > room: # as several windows, which only memory connects
            windows = math.ceil(T / room)
            idx = F.pad(idx, (0, windows * room - T)) # tokens that come last change nothing
        elif longest > room:
            raise ValueError(f"{longest} tokens do not fit into block_size={room}; give at most the last {room} of them")
        starts = not torch.is_tensor(start) and start == 0 # with the first tokens come the vectors before them
        before = self.before if starts else 0
        h, table = self.position(self.embed(idx.unflatten(1, (windows, -1)).flatten(0, 1)), start, before)
        h = self.thoughts(h) if starts else h
        pass_ = Pass(idx, table, cache, before, windows, notes, 0 if shallow else len(self.routers))
        h = self.through(self.streams.expand(self.dropout(h), self.n_stream), pass_)
        if shallow:
            cache.note(0, [[False] * T] * len(idx)) # nobody went on
        if cache is not None:
            cache.length = cache.length + T
        return self.norm(pass_.text(self.streams.reduce(h)))[:, :T]

    def through(self, h, pass_):
        """The layers from a stage on: all that come, or a stage of them, above which the router lets some tokens go on."""
        for layer in self.stages[pass_.stage]:
            h = layer(h, pass_)
        if pass_.stage == pass_.last:
            return h
        return self.routers[pass_.stage](h, pass_, self.through)

    @property
    def memory(self):
        return next((b.body for b in self.between if isinstance(b.body, Memory)), None)

    def logits(self, h):
        return self.cap(widen(self.head(h))) # (..., V)

    @torch.no_grad()
    def uncertainty(self, h, logits=None):
        """The score (...) in [0, 1], see Uncertainty, of h (..., C) of the trunk; logits (..., V) if at hand. ValueError without a head."""
        if "uncertainty" not in self.extras:
            raise ValueError("this model has no uncertainty head; train one with --uncertainty")
        return self.extras["uncertainty"](h, self.logits(h) if logits is None else logits)[0].sigmoid()

    # ------------------------------------------------------------------------------------------------------------------
    # decoding

    def new_cache(self, batch_size, dtype=None, spare=0):
        """
        An empty cache for block_size tokens, and `spare` more that will be thrown away again. dtype: that of the weights, or
        of autocast where that is on.
        """
        weight = self.embed.weight
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        memory = self.memory
        layouts = [b.attention.cache_layout for b in self.blocks] + ([memory.cache_layout] if memory else [])
        return Cache(layouts, batch_size, self.block_size + spare, dtype, weight.device, self.before, len(self.stages),
                     memory.memory_layout if memory else ())

    def slide(self, cache, idx, old, new):
        """
        The window moves from the token `old` of idx (B, T) on to `new`, by halves: the cache is emptied. A memory is carried on, as
        each window's first half left it; halves that were never read in this cache, of a long prompt, are read now.
        """
        half = max(1, self.block_size // 2)
        for begin in range(old, new, half):
            if self.memory is not None and cache.length < half:
                cache.length = 0
                self.trunk(idx[:, begin : begin + half], cache)
            cache.slide(half)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None, use_cache=True, watch=None):
        """
        Yields max_new_tokens tensors (B, 1), each token drawn given all before it; idx (B, T) is the prompt, T >= 1.
        watch(h (B, 1, C), logits (B, 1, V)), if given, sees what each is drawn from.
        Of n tokens the model sees those from window_start(n) on, and a memory of the rest. With and without a cache that is
        the same rule, so both write the same text.
        """
        check_sampling(idx, temperature, top_k, top_p, min_p, max_new_tokens)
        was_training, L = self.training, self.block_size
        self.eval()
        cache, start = self.new_cache(idx.size(0)) if use_cache else None, 0
        try:
            for _ in range(max_new_tokens):
                slid, start = start, window_start(idx.size(1), L)
                if not use_cache and self.memory is not None: # everything anew
                    cache, slid = self.new_cache(idx.size(0)), 0
                if cache is not None:
                    self.slide(cache, idx, slid, start) # if positions moved, the window is read again
                h = self.trunk(idx[:, start + (cache.length if cache is not None else 0) :], cache)[:, -1:]
                logits = self.logits(h) # of the last token alone, also where a prompt is read
                if watch:
                    watch(h, logits)
                p = distribution(logits[:, -1], temperature, top_k, top_p, min_p)
                new = torch.multinomial(p, 1, generator=generator) # (B, 1)
                idx = torch.cat([idx, new], dim=1)
                yield new
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, speculative=False, generator=None,
                 stop=(), use_cache=True, watch=None):
        """
        idx (B, T) -> (B, T + new). temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. speculative: draft and
        verify (Speculation), the same distribution in fewer forwards. A row that has written a token of `stop` repeats it;
        generation ends when every row has. ValueError for values out of range.
        """
        if speculative and (watch or not use_cache):
            raise ValueError("speculative decoding is made of its cache and its own forwards; drop use_cache=False and watch")
        if not len(idx):
            return idx
        if speculative:
            return Speculation(self, idx, temperature, top_k, top_p, min_p, generator).generate(max_new_tokens, stop)
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        stops, out = torch.tensor(list(stop), dtype=idx.dtype, device=idx.device), [idx]
        for new in self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, generator, use_cache, watch):
            out.append(torch.where(ended, out[-1][:, -1:], new))
            ended = ended | torch.isin(new, stops)
            if ended.all():
                break
        return torch.cat(out, dim=1)

    def generate_with_uncertainty(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None, stop=()):
        """
        As generate, which writes the same ids from the same generator -> (ids (B, T + new), scores (B, new)): for each new token the
        score (Uncertainty) of the forward that it was drawn from; 0 where a row only repeats its `stop`. ValueError without the head.
        """
        stop, scores = list(stop), [self.embed.weight.new_zeros(idx.size(0), 0)]
        ids = self.generate(idx, max_new_tokens, temperature, top_k, top_p, min_p, generator=generator, stop=stop,
                            watch=lambda *last: scores.append(self.uncertainty(*last)))
        new = ids[:, idx.size(1) :]
        ended = torch.isin(new, torch.tensor(stop, dtype=ids.dtype, device=ids.device)).cumsum(1) > 1
        return ids, torch.cat(scores, dim=1).masked_fill(ended, 0)

    # ------------------------------------------------------------------------------------------------------------------
    # what it costs, where it comes from

    def num_params(self):
        return sum(p.numel() for p in self.parameters()) # a tied head is counted once

    def flops_per_token(self, T=None):
        """Floating-point operations of one training step per token at context T: forward, and twice that for backward."""
        T = T or self.block_size
        blocks = forward_flops(self.blocks, T + self.before)
        saved = blocks - int(blocks * self.config.target_depth / self.config.n_layer) if self.config.depths else 0
        return 3 * (forward_flops(self, T + self.before) + blocks * self.before // T - saved)

    @classmethod
    def from_checkpoint(cls, path, device="cpu"):
        """The model of a checkpoint that train.py wrote, in eval mode. FileNotFoundError, or ValueError if it cannot be used."""
        return cls.from_state(load_checkpoint(path), path).to(device).eval()

    @classmethod
    def from_state(cls, state, path):
        """The model of what load_checkpoint read from path. ValueError if another version of this file wrote it."""
        try:
            chosen, weights = state["config"]["model"], state["model"]
        except (KeyError, TypeError):
            raise ValueError(f"{path} holds no model of train.py; give its ckpt.pt or best.pt") from None
        model = cls(GPTConfig(**saved_fields(chosen, path)))
        model.load(weights, path)
        return model

    def load(self, weights, path):
        """load_state_dict, with a ValueError where the weights in path are those of another version of this file."""
        try:
            self.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            problem = str(error).splitlines()[:2][-1].strip()[:200] # torch begins with a line that says nothing
            raise ValueError(f"{path} is of another version of model.py: {problem}\n"
                             "use the commit that its run.json names, or train again") from None


def saved_fields(chosen, path):
    """chosen, the fields of GPTConfig that path holds, as keyword arguments. ValueError for a name or a type that GPTConfig lacks."""
    usual = {f.name: f.default for f in fields(GPTConfig)}
    also = {float: (float, int), tuple: (tuple, list)} # JSON writes 1.0 as 1.0, a tuple as a list
    strange = sorted(k for k, v in chosen.items() if k not in usual or type(v) not in also.get(type(usual[k]), (type(usual[k]),)))
    if strange:
        raise ValueError(f"{path} has settings that this model.py does not know: {', '.join(strange)}\n"
                         "use the commit that its run.json names, or train again")
    return chosen


def forward_flops(module, T):
    return sum(m.flops(T) for m in module.modules() if hasattr(m, "flops"))


def softcap(cap, logits):
    return cap * torch.tanh(logits / cap) # Gemma 2, arXiv:2408.00118


# ----------------------------------------------------------------------------------------------------------------------
# presets: fields of GPTConfig for eight sizes. Any field given besides takes precedence; train.py takes vocab_size from the data.

_SHARED = {"activation": "silu", "glu": True, "block_size": 512, "vocab_size": 50048} # 50,000 of a BPE, to a multiple of 64
PRESETS = { # parameters with that vocabulary, the tied embedding counted once; heads are 32, then 64, from large on 128 wide
    "nano": {"n_layer": 6, "n_head": 5, "n_embd": 160, **_SHARED}, # 10M, of which the embedding is 8M
    "micro": {"n_layer": 7, "n_head": 5, "n_embd": 320, **_SHARED}, # 25M
    "tiny": {"n_layer": 10, "n_head": 12, "n_embd": 768, **_SHARED}, # 109M
    "small": {"n_layer": 12, "n_head": 14, "n_embd": 896, **_SHARED}, # 161M
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, **_SHARED}, # 355M
    "large": {"n_layer": 24, "n_head": 12, "n_embd": 1536, **_SHARED}, # 756M
    "xl": {"n_layer": 28, "n_head": 16, "n_embd": 2048, **_SHARED}, # 1.51B
    "xxl": {"n_layer": 36, "n_head": 20, "n_embd": 2560, **_SHARED}, # 2.97B
}


def preset(name):
    """The fields of a model size, {} for the empty name. ValueError for an unknown one names the nearest."""
    if name and name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0)
        raise ValueError(f"unknown model_size {name!r}\nNearest: {', '.join(near)}. There are: {', '.join(PRESETS)}")
    return PRESETS.get(name, {})


# ----------------------------------------------------------------------------------------------------------------------
# sampling


def window_start(n, block_size):
    """First of n tokens that the model reads. Past block_size the window moves by halves: one re-read in block_size/2 tokens."""
    half = max(1, block_size // 2)
    return 0 if n <= block_size else math.ceil((n - block_size) / half) * half


def check_sampling(idx, temperature, top_k, top_p, min_p, max_new_tokens=0):
    for bad, sentence in [
        (max_new_tokens < 0, f"max_new_tokens={max_new_tokens} must not be negative"),
        (not temperature >= 0, f"temperature={temperature} must not be negative; 0 is greedy"),
        (0 < temperature < 1e-6, f"temperature={temperature} is too small to divide by; 0 is greedy"),
        (top_k < 0, f"top_k={top_k} must not be negative; 0 keeps every token"),
        (not 0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]; 1 keeps every token"),
        (not 0 <= min_p < 1, f"min_p={min_p} must be in [0, 1); 0 keeps every token"),
        (idx.size(1) == 0, "the prompt is empty; give at least one token"),
    ]:
        if bad:
            raise ValueError(sentence)


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """
    logits (..., V) -> the probabilities (..., V) that a token is drawn from. temperature, then the top_k likeliest, then the
    smallest set that holds top_p of the rest (Holtzman et al. 2019, arXiv:1904.09751), then those of at least min_p times
    the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = p.cumsum(-1) - p >= top_p # the mass in front of a token already suffices; never true for the first
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    p = logits.softmax(-1)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


# ----------------------------------------------------------------------------------------------------------------------
# speculative decoding: guess some tokens cheaply, let the model judge all of them in one forward, keep those that it would
# have written as well. Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.


def judge(p, q, drafts):
    """
    The rule that leaves the model's distribution as it is. p (B, n+1, V) what the model draws from, q (B, n, V) what the
    drafts (B, n) were drawn from -> the probability (B, n) of keeping each draft if those before it were kept, and what to
    draw from instead of the first that was not, or after the last (B, n+1, V), not normalised.
    """
    at = drafts.unsqueeze(-1)
    keep = (p[:, :-1].gather(2, at) / q.gather(2, at)).squeeze(2) # above 1: always
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0) # after the last draft p itself
    return keep, torch.where(rest.sum(-1, keepdim=True) > 0, rest, p) # equal but for rounding: p again


def draw(p, u):
    """A token of each p (..., V), which need not sum to 1, for a uniform u (...) in [0, 1). Never one of probability 0."""
    mass = p.cumsum(-1, dtype=u.dtype)
    return torch.searchsorted(mass, u.unsqueeze(-1) * mass[..., -1:], right=True).squeeze(-1)


class Speculation:
    """
    A text being written by a model, for B rows at once, each at its own pace: step() is one forward of the model for all of
    them. Drafts come from the model's Ahead cell ("ahead"), from its own first stage of layers where it has depths ("early"; as
    LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710), or from what followed the same last tokens earlier in the text ("ngram").
    "auto" is the cell where there is one, but ngram wherever the text repeats itself; early has not paid yet (README). Drafting
    stops for a while where too few drafts are kept to pay for themselves.
    """

    TRIAL, PAUSE = 32, 512 # forwards with drafts between two decisions; tokens of each row without drafts
    # Of drafting a token and judging it, in plain forwards: on a CPU with the model of train_shakespeare_diffmla.py a forward of
    # eight tokens takes about 1.35 of one, seven drafts 0.35, (0.35 + 0.35) / 7. A constant, so that a seed writes one text anywhere.
    COST = 0.1

    def __init__(self, model, idx, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None, draft="auto"):
        check_sampling(idx, temperature, top_k, top_p, min_p)
        if draft not in ("auto", "ahead", "early", "ngram"):
            raise ValueError(f"draft={draft!r} is none of auto, ahead, early, ngram")
        if draft == "ahead" and "ahead" not in model.extras:
            raise ValueError("draft=ahead needs a model trained with n_ahead; use draft=ngram, or train one with --n_ahead=7")
        self.model, self.generator, self.rows, self.prompt = model, generator, idx.tolist(), idx.size(1)
        self.sampling, self.device = (temperature, top_k, top_p, min_p), idx.device
        if draft == "early" and not model.routers:
            raise ValueError("draft=early needs a model with depths; use draft=ngram, or train one with --depths")
        self.best = getattr(self, ("ahead" if "ahead" in model.extras else "ngram") if draft == "auto" else draft)
        self.source = self.both if draft == "auto" else self.best
        self.cost = self.COST + (model.config.stage_depths[0] / model.config.target_depth if self.best == self.early else 0)
        self.n = min(model.config.n_ahead or 7, model.block_size - 1)
        self.starts = [-1] * len(self.rows) # first token of each row's window; -1: nothing has been read
        self.cache = model.new_cache(len(self.rows), spare=self.n) # a row at the end of its window still takes drafts, none is kept
        self.h = None # (B, C) the trunk's output at the last token that was read
        self.seen, self.noted = [{} for _ in self.rows], [2] * len(self.rows) # of ngram: last tokens -> what place followed them
        self.forwards = self.tokens = self.drafted = self.kept = 0 # of all rows
        self.seconds, self.timed = 0.0, 0 # spent in step, and tokens written; without the first, which reads the prompt
        self.trial, self.pause = Counter(), 0 # what the drafts of the last few forwards came to; tokens until the next trial

    def generate(self, max_new_tokens, stop=()):
        """(B, T + new), as GPT.generate."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
        stop, end = {int(token) for token in stop}, self.prompt + max_new_tokens
        ends = [end if not max_new_tokens else None for _ in self.rows] # the length of each row when it is complete
        while None in ends:
            before = [len(row) for row in self.rows]
            self.step()
            for b, row in enumerate(self.rows):
                stopped = next((i + 1 for i in range(before[b], len(row)) if row[i] in stop), end)
                if ends[b] is None and (len(row) >= end or stopped < end):
                    ends[b] = min(stopped, end)
        longest = max(ends, default=0)
        return torch.tensor([row[:e] + row[e - 1 : e] * (longest - e) for row, e in zip(self.rows, ends)], device=self.device)

    def __iter__(self):
        """Of a single row: its tokens, without end."""
        while True:
            yield from self.step()[0]

    @torch.no_grad()
    def step(self):
        """One forward -> for each row the tokens that it wrote: one or more, or none while another row's window is read."""
        began, was_training = time.perf_counter(), self.model.training
        starts = [window_start(len(row), self.model.block_size) for row in self.rows]
        moved = [b for b, (new, old) in enumerate(zip(starts, self.starts)) if new != old]
        old, self.starts = self.starts, starts
        if was_training: # a walk through all modules, so not for nothing
            self.model.eval()
        try:
            wrote = self.read(moved, old) if moved else self.draft_and_judge()
        finally:
            if was_training:
                self.model.train()
        for row, new in zip(self.rows, wrote):
            row.extend(new)
        if self.forwards:
            self.seconds, self.timed = self.seconds + time.perf_counter() - began, self.timed + sum(map(len, wrote))
        self.forwards, self.tokens = self.forwards + 1, self.tokens + sum(map(len, wrote))
        return wrote

    def read(self, moved, before):
        """Rows whose window starts elsewhere than before (all, at first) are read from there, and write one token each."""
        wrote = [[] for _ in self.rows]
        together = len(moved) == len(self.rows) and len({*zip(map(len, self.rows), before)}) == 1
        for part in [slice(0, len(self.rows))] if together else [slice(b, b + 1) for b in moved]:
            old, start, cache = max(0, before[part][0]), self.starts[part][0], self.cache.part(part)
            row = self.tensor([row[old:] for row in self.rows[part]]) # (rows, T), of which the last token is unread
            cache.length = row.size(1) - 1 if before[part][0] >= 0 else 0
            self.model.slide(cache, row, 0, start - old)
            h = self.model.trunk(row[:, start - old :], cache)[:, -1]
            self.h = h.new_zeros(len(self.rows), h.size(1)) if self.h is None else self.h
            self.h[part] = h
            new = draw(self.distribution(h), self.uniform(len(h)))
            wrote[part] = [[token] for token in new.tolist()]
        return wrote

    def draft_and_judge(self):
        B, L = len(self.rows), self.model.block_size
        inside = [len(row) - start for row, start in zip(self.rows, self.starts)] # tokens of the window, the last one unread
        room = [min(self.n, L - m) if not self.pause else 0 for m in inside] # for drafts
        drafts, q, limits = self.source(room)
        n = drafts.size(1)
        self.rewind()
        h = self.model.trunk(torch.cat([self.tensor([row[-1:] for row in self.rows]), drafts], dim=1), self.cache) # (B, n+1, C)
        p = self.distribution(h) # (B, n+1, V)
        keep, after = judge(p, q, drafts)
        for b, limit in enumerate(limits):
            if limit < n: # no draft there: not a rejection
                keep[b, limit:], after[b, limit] = 0, p[b, limit]
        u = self.uniform(B, n + 1)
        kept = (u[:, :n] < keep).cumprod(1).sum(1) # (B,)
        every = torch.arange(B, device=self.device)
        new, self.h = draw(after[every, kept], u[:, n]), h[every, kept] # h of the last token kept: the new one is still unread
        wrote = [row[:k] + [last] for row, k, last in zip(drafts.tolist(), kept.tolist(), new.tolist())]
        self.judge_drafting(sum(limits), sum(map(len, wrote)) - B, sum(map(len, wrote)))
        return wrote

    def rewind(self):
        """The cache holds each row but for its last token, and no draft."""
        lengths = [len(row) - start - 1 for row, start in zip(self.rows, self.starts)]
        self.cache.length = lengths[0] if len(set(lengths)) == 1 else self.tensor(lengths)

    def judge_drafting(self, drafted, kept, written):
        """Where the drafts of TRIAL forwards saved less than they cost, the next PAUSE tokens go without."""
        self.drafted, self.kept, self.pause = self.drafted + drafted, self.kept + kept, max(0, self.pause - written)
        self.trial.update(forwards=drafted > 0, drafted=drafted, kept=kept)
        if self.trial["forwards"] == self.TRIAL:
            if self.trial["kept"] < self.cost * self.trial["drafted"]:
                self.pause = self.PAUSE * len(self.rows)
            self.trial.clear()

    def distribution(self, h):
        """What the model draws from after h (..., C). ValueError for numbers that are not finite: every token would be the first."""
        p = distribution(self.model.logits(h), *self.sampling)
        if not math.isfinite(p.sum()):
            raise ValueError("the model's probabilities are not finite; its weights may be damaged, or half precision overflows")
        return p

    def ahead(self, room):
        """Drafts (B, n) of the cell, what they were drawn from (B, n, V), and how many of them each row can take."""
        cell, s = self.model.extras["ahead"], self.h

        def guess(x):
            nonlocal s
            s = cell(s, F.embedding(x, self.model.embed.weight))
            return s

        return self.one_by_one(room, guess)

    def early(self, room):
        """The same of the first stage of layers. The keys and values that it leaves in the cache are written again by the judge."""
        self.rewind()
        return self.one_by_one(room, lambda x: self.model.trunk(x[:, None], self.cache, shallow=True)[:, 0])

    def one_by_one(self, room, guess):
        """Each draft from guess(x) (B, C), what the head is to read after the tokens x (B,)."""
        model, x = self.model, self.tensor([row[-1] for row in self.rows])
        drafts, q = [], []
        for race in -self.uniform(max(room), len(self.rows), model.config.vocab_size).log(): # exponential
            q.append(distribution(model.cap(widen(few_rows(guess(x), model.head.weight))), *self.sampling)) # model.logits without a module
            drafts.append(x := (q[-1] / race).argmax(-1)) # the first to finish, at race / q, is distributed as q: less work than draw
        if not drafts:
            return self.tensor([[]] * len(room)), self.h.new_zeros(len(room), 0, model.config.vocab_size), room
        return torch.stack(drafts, dim=1), torch.stack(q, dim=1), room

    def ngram(self, room, lengths=(6, 4, 3, 2)):
        """The same from the text: what followed the longest of the last 6 to 2 tokens that were there before."""
        found = []
        for b, (row, seen, limit) in enumerate(zip(self.rows, self.seen, room)):
            for end in range(self.noted[b], len(row)): # each place once, when something follows it
                seen.update({tuple(row[end - m : end]): end for m in lengths if m <= end})
            self.noted[b] = len(row)
            at = next((seen[key] for m in lengths if (key := tuple(row[-m:])) in seen), len(row))
            period = len(row) - at # 0: there is none; where the text ends it goes round
            found.append([row[at + i % period] for i in range(limit if period else 0)])
        limits = [len(f) for f in found]
        drafts = self.tensor([f + [0] * (max(limits) - len(f)) for f in found])
        return drafts, F.one_hot(drafts, self.model.config.vocab_size).to(self.h.dtype), limits

    def both(self, room):
        """The text's own, where the last 6 tokens of every row were there before, as they are in loops of greedy text; else the best."""
        if self.best == self.ngram:
            return self.ngram(room)
        drafts, q, limits = self.ngram(room, (6,))
        return (drafts, q, limits) if all(limits) else self.best(room)

    def tensor(self, ids):
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def uniform(self, *shape):
        dtype = torch.float32 if self.device.type == "mps" else torch.float64 # which mps has not
        return torch.rand(shape, dtype=dtype, device=self.device, generator=self.generator)

    def __str__(self):
        rate = f"{self.kept / self.drafted:.0%} of {self.drafted:,} drafts kept" if self.drafted else "nothing drafted"
        return f"{self.tokens / max(1, self.forwards) / len(self.rows):.2f} tokens per forward, {rate}"


# ----------------------------------------------------------------------------------------------------------------------
# the device


def choose_device(name):
    """(device, the reason) for auto | cpu | cuda | cuda:1 | mps. ValueError if it cannot be used here."""
    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}\nuse --device=auto, or cpu") from None
        return name, "as asked"
    if torch.cuda.is_available():
        return "cuda", "auto: a CUDA GPU is there"
    if torch.backends.mps.is_available():
        return "mps", "auto: no CUDA, but Apple's GPU"
    return "cpu", "auto: no CUDA, no MPS"


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: one file, which torch.load reads as it stands. torch.load does not notice damaged tensor bytes, so the
# sha256 of all other bytes is kept in the comment field that the zip format has at its very end.

_SEAL = 7 + 64 # b"sha256:" and 64 hex digits


def save_checkpoint(path, state, keep_previous=True):
    """
    Write all, then rename: whenever the process dies, a whole checkpoint is there. The one before becomes *.prev.pt.
    OSError or RuntimeError if it cannot be written (a full disk); what was there before is then untouched.
    """
    part = f"{path}.part"
    try:
        torch.save(state, part)
        seal(part)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise
    if keep_previous and os.path.exists(path):
        os.replace(path, previous_checkpoint(path))
    os.replace(part, path)


def seal(path):
    """Append the sha256 of the file, and force all of it onto the disk."""
    with open(path, "r+b") as f:
        f.seek(-2, os.SEEK_END)
        f.write(struct.pack("<H", _SEAL)) # the length of the comment that follows
        f.seek(0)
        digest = hashlib.sha256()
        while chunk := f.read(1 << 24):
            digest.update(chunk)
        f.write(b"sha256:" + digest.hexdigest().encode())
        f.flush()
        os.fsync(f.fileno())


def previous_checkpoint(path):
    return os.path.splitext(path)[0] + ".prev.pt"


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. FileNotFoundError; ValueError if the file is damaged or somebody else's."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give a file in it: best.pt or ckpt.pt")
    with open(path, "rb") as f:
        blob = f.read()
    if blob[-_SEAL:-64] != b"sha256:":
        raise ValueError(f"{path} is cut short, or was not written by train.py; give a checkpoint of train.py (ckpt.pt, best.pt)")
    if hashlib.sha256(blob[:-_SEAL]).hexdigest().encode() != blob[-64:]:
        raise ValueError(f"{path} is damaged: its bytes do not match the sha256 it carries; use another checkpoint of the run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error: # torch.load raises many kinds for a pickle that is not made of tensors and plain values
        raise ValueError(f"{path} holds more than weights and numbers, or less: {str(error).splitlines()[0][:120]}\n"
                         "it is not what train.py writes and may run code; use another checkpoint") from None


# ----------------------------------------------------------------------------------------------------------------------
# python model.py: the learner's door


def describe(config, T, batch_size=1):
    """Prints the model as one batch flows through it. Built on the meta device: shapes and counts, no numbers, no memory."""
    with torch.device("meta"):
        model = GPT(config)
        idx = torch.zeros(batch_size, T, dtype=torch.long)
    rows = {} # name -> [module, what it gave], parents before their parts
    for name, m in model.named_modules():
        m.register_forward_pre_hook(lambda m, i, name=name: rows.setdefault(name, [m, None]) and None)
        m.register_forward_hook(lambda m, i, o, name=name: rows[name].__setitem__(1, o[0] if isinstance(o, tuple) else o))
    model(idx, targets=idx)
    print(f"{'part':<34}{'class':<13}{'output':<24}{'parameters':>12}{'forward FLOPs/token':>21}")
    print(f"{'tokens':<34}{'':<13}{str(tuple(idx.shape)):<24}")
    for name, (m, out) in rows.items():
        if isinstance(m, (nn.Identity, nn.Dropout)) or not name or name.startswith("blocks.") and not name.startswith("blocks.0"):
            continue # the other blocks are like the first
        label = "  " * (name.count(".") - 1) + name.removeprefix("blocks.0.") if name.startswith("blocks.0.") else name
        count, flops = sum(p.numel() for p in m.parameters()), forward_flops(m, T)
        label = f"blocks.0 (of {config.n_layer})" if name == "blocks.0" else label
        print(f"{label:<34}{type(m).__name__:<13}{str(tuple(out.shape)):<24}{count:>12,}{flops:>21,}")
    cache = model.new_cache(1, torch.float32)
    print(f"\n{model.num_params():,} parameters{' (head and embedding share theirs)' if config.tie_embeddings else ''}; "
          f"{model.flops_per_token(T):,} training FLOPs per token at context {T}")
    fp32, bf16 = (model.new_cache(1, kind).nbytes() // (cache.before + cache.capacity) for kind in (torch.float32, torch.bfloat16))
    print(f"cache: {fp32:,} bytes per token in fp32, {bf16:,} in bf16")


def show_presets():
    """Prints the table of sizes, each built on the meta device so that the count is the model's own."""
    print(f"{'--model_size':<14}{'layers':>7}{'heads':>7}{'width':>7}{'context':>9}{'parameters':>15}")
    for name, preset in PRESETS.items():
        c = GPTConfig(**preset)
        with torch.device("meta"):
            count = GPT(c).num_params()
        print(f"{name:<14}{c.n_layer:>7}{c.n_head:>7}{c.n_embd:>7}{c.block_size:>9}{count:>15,}")


model_size = "" # setting of this door and of train.py: a name in PRESETS; empty: the defaults of GPTConfig

if __name__ == "__main__":
    from configurator import configure, user_errors

    out_dir = "" # folder of a run, whose model is described; in a config file it has no effect
    given = configure(globals(), GPTConfig, guest_of=os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"))
    with user_errors():
        config = GPTConfig(**{**preset(given.pop("model_size", "")), **without_orphans(given, given.typed)})
    if "vocab_size" not in given:
        print(f"(vocab_size={config.vocab_size:,} is the default; train.py takes it from the data: characters of Shakespeare are 65)\n")
    describe(config, config.block_size)
    if config == GPTConfig():
        print()
        show_presets()
