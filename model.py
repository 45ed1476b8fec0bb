"""Every architecture of nanoSLM in one file.

Read GPTConfig first: it lists what can be chosen. Then read Block and GPT.forward: a model is a stack of
blocks, and a block holds one choice of each slot. After that each slot has a section, then come the extras,
the rules, checkpoints and sizes. All choices are made in __init__; no forward reads the config.

  python model.py --attention=diff_mla   prints that model as data flows through it: shapes, parameters, FLOPs
  python model.py export out/run --format=hf --to=FOLDER          for transformers, and what reads its files
  python model.py export out/run --format=weights --to=FILE.pt    a checkpoint without the optimizer's state

B batch   T new tokens   S tokens attended to, cached and new   C channels (n_embd)   V vocabulary
H heads (n_head)   K key/value heads (n_kv_head)   D head width (head_dim)   R latent rank (kv_rank)
P rotary width (rope_dim)   N residual streams (n_stream)   M memory slots   G tokens of a memory segment
Q query heads: H, or 2 H with diff_form=v2   U = D - P   E width of a map's output: D, 2 D, or R while latent

To add a variant: write one small class, add one row to the table of its slot, add its knobs to GPTConfig and
to the class's `knobs`, and add its values to CHOICES in tests/test_model.py. Nothing else changes.
"""
import configurator # first: see stop_at_once there

import copy
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from kernels import (ACTIVATIONS, activate, gated_pair, linear_cross_entropy, mhc_coefficients, mhc_gates,
                     pad_vocabulary, product_dtype, project, read_streams, rmsnorm, rope_table, rotate,
                     short_conv, widen, write_streams)


# --- the configuration --------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """What a model is. A knob left at 0 takes its usual value, which follows from the other fields."""

    block_size: int = 256 # longest context L, in tokens
    vocab_size: int = 50304 # train.py takes it from the data; here GPT-2's 50257, to a multiple of 64
    n_layer: int = 6 # number of blocks
    n_embd: int = 384 # channels C
    norm: str = "rmsnorm" # layernorm | rmsnorm
    position: str = "rope" # learned | rope | none
    rope_base: float = 10000.0 # slowest rotary wavelength: 2 pi base^(1 - 2/P) tokens
    attention: str = "mha" # mha | mla | diff | diff_mla
    n_head: int = 6 # heads H; with diff_form=v1 it counts the maps, two of which make one differential head
    n_kv_head: int = 0 # key/value heads of mha and diff: 0 = n_head, 1 = multi-query
    head_dim: int = 0 # width D of a head, rotary part included: 0 = n_embd // n_head
    qk_norm: bool = False # RMSNorm of queries and keys (with a latent: of queries and the shared rotary key)
    kv_rank: int = 0 # width R of the latent that mla and diff_mla cache: 0 = n_embd // 4
    q_rank: int = 0 # rank of the query projection of mla and diff_mla: 0 = direct
    rope_dim: int = 0 # rotary width P of mla and diff_mla, part of head_dim: 0 = head_dim // 2
    diff_form: str = "v2" # v1: lambda per layer, norm per head | v2: lambda per token, doubled queries
    activation: str = "relu2" # gelu | gelu_tanh | relu2 | silu | telu | crrelu
    glu: bool = False # gate the MLP: down(act(gate x) * up x)
    mlp_hidden: int = 0 # MLP width: 0 = 4 C; with glu 8/3 C, up to a multiple of 32
    residual: str = "plain" # plain | hyper | mhc
    n_stream: int = 0 # residual streams N of hyper and mhc: 0 = 4, as in both papers
    h_res: str = "sinkhorn" # how mhc makes its mixing matrix doubly stochastic: sinkhorn | permutations
    sinkhorn_iters: int = 20 # iterations of h_res=sinkhorn
    init_std: float = 0.0 # initial weights: 0 = 1 / sqrt(n_in), a quarter of it outside blocks; GPT-2: 0.02
    zero_init: bool = False # start the residual projections at 0: every block is then the identity
    dropout: float = 0.0 # after the embedding and after each sublayer; never on attention weights
    bias: bool = False # biases in the projections around attention, in the MLP and in LayerNorm, as GPT-2
    tie_embeddings: bool = True # the head reuses the token embedding
    logit_softcap: float = 0.0 # logits become cap * tanh(logits / cap): 0 = off
    gradient_checkpointing: bool = False # compute each block again in backward: less memory, more time
    thought_tokens: int = 0 # learned vectors in front of the text, which every token sees: 0 = off
    memory_slots: int = 0 # slots of a memory that each segment fills and later ones consult: 0 = off
    memory_segment: int = 0 # tokens that go into the memory together: 0 = block_size / 4
    document_token: int = -1 # the token that empties memory; train.py asks the tokenizer: -1 = none
    future_peek: int = 0 # tokens whose mean embedding is predicted, for the layers above: 0 = off
    depths: tuple = () # layers after which a token may stop, n_layer last: (2, 4, 8); () = off
    mean_depth: float = 0.0 # layers that a token takes on average: 0 = halfway from first to last
    n_ahead: int = 0 # tokens that a small cell learns to draft, for speculative decoding: 0 = off, 7 is usual
    uncertainty: bool = False # a small head learns how probable it is that the likeliest next token is wrong
    conv: int = 0 # tokens that a short causal convolution sees before attention and MLP: 0 = off, 4 is usual
    norm_eps: float = 0.0 # added to the mean square in norms of width C: 0 = 1e-6, with layernorm 1e-5

    def __post_init__(self):
        if type(self.depths) is list: # JSON makes lists of tuples
            self.depths = tuple(self.depths)
        for sentence in complaints(self):
            raise ValueError(sentence)

    # What the sizes are, with 0 replaced by its usual value.
    kv_heads = property(lambda c: c.n_kv_head or c.n_head)
    head_width = property(lambda c: c.head_dim or c.n_embd // c.n_head)
    latent_rank = property(lambda c: c.kv_rank or c.n_embd // 4)
    streams = property(lambda c: c.n_stream or RESIDUAL[c.residual].usual_streams)
    hidden = property(lambda c: c.mlp_hidden or (math.ceil(c.n_embd / 12) * 32 if c.glu else 4 * c.n_embd))
    segment = property(lambda c: c.memory_segment or max(1, c.block_size // 4))
    stage_depths = property(lambda c: c.depths or (c.n_layer,)) # last layer of each stage
    target_depth = property(lambda c: c.mean_depth or (c.stage_depths[0] + c.n_layer) / 2)
    # Memory and peek lie above this layer, and below any router, because all tokens pass there.
    middle = property(lambda c: min(max(1, c.n_layer // 2), c.stage_depths[0]))

    @property
    def rotary_width(self) -> int: # how much of a query or key is rotated: the attention class knows
        heads, _ = ATTENTION[self.attention]
        return heads.rotary_width(self) if POSITION[self.position].rotates else 0


# --- the model ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP. Each reads the residual stream(s) and writes to them: with
    residual=plain, read(h) is h and write is h + output; the other choices carry N streams.
    """
    def __init__(self, c, layer):
        super().__init__()
        residual, (heads, maps) = RESIDUAL[c.residual], ATTENTION[c.attention]
        self.residual1, self.residual2 = residual(c, 2 * layer), residual(c, 2 * layer + 1)
        self.norm1, self.attention = norm(c), heads(c, layer, maps(c, layer))
        self.norm2, self.mlp = norm(c), GLU[c.glu](c)
        self.conv1, self.conv2 = (ShortConv(c) if c.conv else NoConv() for _ in range(2))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, pass_): # (B, T, C), or (B, T, N, C) with streams -> the same shape
        x, mix = self.residual1.read(h) # (B, T, C)
        x = self.conv1(self.norm1(x), pass_)
        h = self.residual1.write(h, self.dropout(self.attention(x, pass_)), mix)
        x, mix = self.residual2.read(h)
        x = self.conv2(self.norm2(x), pass_)
        return self.residual2.write(h, self.dropout(self.mlp(x)), mix)


class CheckpointedBlock(Block):
    """Keeps only its input for backward and computes the rest again."""
    def forward(self, h, pass_):
        if not torch.is_grad_enabled() or pass_.cache is not None: # a second run would store into it again
            return super().forward(h, pass_)
        return checkpoint(super().forward, h, pass_, use_reentrant=False)


class GPT(nn.Module):
    """logits, losses = model(idx, targets)

    idx (B, T) int64, T <= block_size. With a memory and no cache T may be larger: the text is then split into
    windows that only the memory connects.
    With targets (B, T), where -1 is ignored: logits (B, T, V) and losses {"ce": nats per token}; train mode
    adds the losses of the extras that have one.
    Without targets: logits (B, 1, V) of the last token, and {}.
    With a cache: idx are the tokens that follow those in the cache; logits (B, T, V).
    Logits are fp32 (fp64 for a model in double). with_logits=False returns None for them and the same losses,
    without ever holding all logits: that is what training needs.
    """
    def __init__(self, config: GPTConfig):
        super().__init__()
        c = self.config = config
        self.block_size, self.n_stream, self.n_thought = c.block_size, c.streams, c.thought_tokens
        self.cache_dtype = "auto" # of new_cache, where its caller names none
        self.tokenizer = None # a data.Tokenizer, where the weights came with one
        extras = [make for knob, make in EXTRAS.items() if getattr(c, knob)]
        self.embed = Embedding(c.vocab_size, c.n_embd, outer_std(c))
        self.position = POSITION[c.position](c)
        self.thoughts = Thoughts(c) if c.thought_tokens else nn.Identity()
        self.dropout = nn.Dropout(c.dropout)
        self.streams = RESIDUAL[c.residual]
        make_block = CheckpointedBlock if c.gradient_checkpointing else Block
        self.blocks = nn.ModuleList(make_block(c, layer) for layer in range(c.n_layer))
        between = [make for make in EXTRAS.values() if make.place == "between two blocks"]
        self.between = nn.ModuleList(Between(c, make(c), 2 * c.n_layer + i)
                                     for i, make in enumerate(between) if make in extras)
        self.routers = nn.ModuleList(Router(c, stage) for stage in range(len(c.stage_depths) - 1))
        # Without depths one stage holds all layers. With depths each stage but the last ends with a router.
        bottom = [*self.blocks[: c.middle], *self.between, *self.blocks[c.middle : c.stage_depths[0]]]
        self.stages = [bottom, *(list(self.blocks[a:b]) for a, b in itertools.pairwise(c.stage_depths))]
        self.norm = norm(c)
        self.head = Linear(c.n_embd, c.vocab_size, False, outer_std(c), role="head")
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.softcap = c.logit_softcap
        self.cap = partial(softcap, c.logit_softcap) if c.logit_softcap else nn.Identity()
        # Drawn from a copy of the random state, so that these parts do not change the dropout of the trunk.
        device = torch.get_default_device()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            beside = {make.loss_name: make(c) for make in extras if make.place == "beside the trunk"}
            self.extras = nn.ModuleDict(beside)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: "Cache | None" = None,
                with_logits: bool = True) -> tuple[torch.Tensor | None, dict]:
        if not with_logits and targets is None:
            raise ValueError("with_logits=False leaves nothing to return without targets; give targets")
        notes = {}
        h = self.trunk(idx, cache, notes) # (B, T, C)
        if cache is None and targets is None:
            h = h[:, -1:] # sampling needs the last token alone
        logits = self.logits(h) if with_logits else None # (B, T, V)
        if targets is None:
            return logits, {}
        if with_logits:
            losses = {"ce": F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)}
        else:
            losses = {"ce": linear_cross_entropy(h, self.head.weight, targets, self.softcap)}
        if self.training:
            own = {m.loss_name: m for m in self.modules() if hasattr(m, "loss_name")} # all routers share one
            losses |= {name: module.loss(self, h, idx, targets, notes) for name, module in own.items()}
        return logits, losses

    def trunk(self, idx: torch.Tensor, cache: "Cache | None" = None,
              notes: dict | None = None) -> torch.Tensor:
        """Token ids (B, T) -> the head's input (B, T, C). notes: a dict to collect what extra losses need."""
        if idx.dim() != 2 or not idx.size(1):
            raise ValueError(f"idx {tuple(idx.shape)} must be (B, T) with at least one token")
        T, windows = idx.size(1), 1
        start, length, room, front = 0, T, self.block_size, self.n_thought
        if cache is not None: # it holds the thoughts already, so none are put in front
            start, length, room, front = cache.length, cache.end(T) - cache.front, cache.capacity, 0
        if length > room:
            if cache is not None or self.memory is None:
                raise ValueError(f"{length} tokens do not fit into block_size={room}; give the last {room}")
            windows = math.ceil(T / room)
            idx = F.pad(idx, (0, windows * room - T)) # no token sees the padding: it comes last
        h = self.embed(idx.unflatten(1, (windows, -1)).flatten(0, 1)) # (B windows, T, C)
        h, table = self.position(h, start, front)
        h = self.thoughts(h) if front else h # (B windows, front + T, C)
        h = self.layers(h, Pass(idx, start, front, windows, table, cache, notes)) # (B, windows T, C)
        if cache is not None:
            cache.length = start + T
        return self.norm(h)[:, :T]

    def layers(self, h, pass_):
        """Runs all stages. (B windows, front + T, C) -> (B, windows T, C), without the thoughts in front."""
        h = self.stage(self.streams.expand(self.dropout(h), self.n_stream), pass_)
        if pass_.inputs:
            pass_.cache.keep(pass_.recent_at, pass_.inputs)
        return pass_.text(self.streams.reduce(h))

    def stage(self, h, pass_):
        """The layers of one stage for the tokens that reach it; its router then runs the stages above."""
        for layer in self.stages[pass_.stage]:
            h = layer(h, pass_)
        if pass_.stage == len(self.routers):
            return h
        return self.routers[pass_.stage](h, pass_, self.stage)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.cap(widen(self.head(h))) # (..., V)

    @property
    def memory(self) -> "Memory | None":
        return next((b.body for b in self.between if b.body.remembers), None)

    # --- decoding; the loops stand in sample.py ---

    def new_cache(self, batch_size: int, dtype: torch.dtype | str | None = None, spare: int = 0) -> "Cache":
        """A cache with the thoughts in it, for block_size tokens and `spare` more: drafts that will not stay.
        dtype: "auto" is that of autocast where it is on and not on a CPU, else that of the weights; "int8"
        and "int4" round keys, values and latents (quantize). None: self.cache_dtype. ValueError for others.
        """
        weight, memory, dtype = self.embed.weight, self.memory, dtype or self.cache_dtype
        bits = Cache.BITS.get(dtype, 0)
        if dtype in Cache.BITS: # what is not rounded has the usual type
            dtype = weight.dtype if weight.is_cpu else product_dtype(weight)
        elif not isinstance(dtype, torch.dtype):
            raise ValueError(f"cache_dtype={dtype!r} is none of {', '.join(Cache.BITS)}")
        layouts = [block.attention.cache_layout for block in self.blocks]
        layouts += [memory.cache_layout] if memory else []
        c, back = self.config, Cache.ROLLBACK + self.config.n_ahead + spare
        cache = Cache(layouts, batch_size, self.block_size + spare, dtype, weight.device, self.n_thought,
                      len(self.routers), memory.memory_layout if memory else (),
                      (2 * c.n_layer, c.n_embd, c.conv, back) if c.conv else (), bits)
        if self.n_thought:
            self.fill_thoughts(cache, batch_size)
        return cache

    @torch.no_grad()
    def fill_thoughts(self, cache, batch_size):
        """Stores the thoughts before position 0. They depend on no text, so one computation serves all."""
        was_training, cache.length = self.training, -self.n_thought
        self.eval() # the cache must not depend on a draw of dropout
        no_text = torch.zeros(batch_size, 0, dtype=torch.long, device=self.embed.weight.device)
        h, table = self.position(self.embed(no_text), 0, self.n_thought)
        self.layers(self.thoughts(h), Pass(no_text, cache.length, self.n_thought, 1, table, cache))
        cache.length = 0
        self.train(was_training)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, min_p: float = 0.0, speculative: bool = False,
                 generator: torch.Generator | None = None, stop: Iterable[int] = (), use_cache: bool = True,
                 watch: Callable | None = None) -> torch.Tensor:
        """idx (B, T) -> (B, T + new). temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.
        speculative: draft and judge (sample.Speculation): the same distribution from fewer forwards.
        A row that has written a token of `stop` repeats it; generation ends when every row has.
        watch: see sample.stream. ValueError for values out of range.
        """
        import sample # it imports this file

        return sample.generate(self, idx, max_new_tokens, temperature, top_k, top_p, min_p, speculative,
                               generator, stop, use_cache, watch)

    def generate_with_uncertainty(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                                  **sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids (B, T + new), scores (B, new)). ids: those that generate draws from the same generator.
        A score (class Uncertainty) belongs to the forward that its token was drawn from; it is 0 where a row
        only repeats its `stop`. sampling: top_k, top_p, min_p, generator, stop. ValueError without the head.
        """
        import sample

        return sample.generate_with_uncertainty(self, idx, max_new_tokens, temperature, **sampling)

    @torch.no_grad()
    def uncertainty(self, h: torch.Tensor, logits: torch.Tensor | None = None) -> torch.Tensor:
        """The score (...) in [0, 1] of the trunk's output h (..., C). ValueError without the head."""
        if "uncertainty" not in self.extras:
            raise ValueError("this model has no uncertainty head; train one with --uncertainty")
        return self.extras["uncertainty"](h, self.logits(h) if logits is None else logits)[0].sigmoid()

    # --- what it costs, where it comes from ---

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters()) # a tied head is counted once

    def flops_per_token(self, T: int | None = None) -> int:
        """Floating-point operations of a training step per token at context T: backward is two forwards."""
        T, c = T or self.block_size, self.config
        S = T + self.n_thought
        blocks = forward_flops(self.blocks, S)
        taken = int(blocks * c.target_depth / c.n_layer) if c.depths else blocks # by a mean token
        thoughts = blocks * self.n_thought // T # each text token pays its share of them
        return 3 * (forward_flops(self, S) - blocks + taken + thoughts)

    @classmethod
    def from_checkpoint(cls, path: str, device: str = "cpu") -> "GPT":
        """The model of a file or run (load_run), in eval mode. FileNotFoundError; ValueError if unusable."""
        state, path = load_run(path)
        return cls.from_state(state, path).to(device).eval()

    @classmethod
    def from_pretrained(cls, source: str, data_dir: str = "data", device: str = "cpu") -> "GPT":
        """The model of other programs' weights, in eval mode, with its tokenizer or None. source: a name in
        GPT2, a folder with config.json, nanoGPT's ckpt.pt, or what from_checkpoint takes. ValueError if there
        is none, or if it has what our architecture lacks.
        """
        path, transposed = os.path.expanduser(source), True
        if source in GPT2:
            *sizes, revision = GPT2[source]
            sizes = dict(zip(("n_layer", "n_head", "n_embd"), sizes), vocab_size=50257, n_positions=1024)
            chosen, repo = our_fields({"model_type": "gpt2", **sizes}, source), f"openai-community/{source}"
            theirs = weights_in(data.hub_file(repo, revision, "model.safetensors", data_dir, kind=""))
        elif os.path.isfile(os.path.join(path, "config.json")):
            chosen = our_fields(read_json(Path(path, "config.json")), path)
            theirs = weights_in(Path(path))
        elif os.path.isfile(path) and "model_args" in (state := unpickled(path)):
            usual = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
            chosen, theirs, transposed = {**usual, **state["model_args"]}, state["model"], False # nanoGPT's
        elif os.path.exists(path):
            return cls.from_checkpoint(path, device)
        else:
            raise ValueError(f"no weights {source!r}: give a folder, a .pt file, or one of {', '.join(GPT2)}")
        model = cls(GPTConfig(**saved_fields(chosen, path)))
        copy_weights(weights_of(model, transposed), theirs, path)
        model.tokenizer = tokenizer_of(path, model.config.vocab_size, data_dir)
        return model.to(device).eval()

    @classmethod
    def from_state(cls, state: dict, path: str) -> "GPT":
        """The model in what load_checkpoint(path) returned. ValueError if another model.py wrote it."""
        try:
            chosen, weights = state["config"]["model"], state["model"]
        except (KeyError, TypeError):
            raise ValueError(f"{path} holds no model of train.py; give its ckpt.pt or best.pt") from None
        model = cls(GPTConfig(**saved_fields(chosen, path)))
        model.load(weights, path)
        if state.get("tokenizer"): # of a run on ids without text there is none
            data_dir = state["config"].get("train", {}).get("data_dir", "data")
            model.tokenizer = data.tokenizer_from_dict(state["tokenizer"], data_dir)
        return model

    def load(self, weights: dict, path: str) -> None:
        """load_state_dict, with a ValueError that names path if another model.py wrote the weights."""
        try:
            self.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            problem = str(error).splitlines()[:2][-1].strip()[:200] # torch's first line says nothing
            raise ValueError(f"{path} is of another version of model.py: {problem}\n"
                             "use the commit that its run.json names, or train again") from None

    @torch.no_grad()
    def start_from(self, other: "GPT") -> None:
        """Copies the weights of a model that differs in MAY_CHANGE at most, and prints what changes."""
        was, now, theirs = other.config, self.config, other.state_dict()
        for name, ours in self.state_dict().items():
            if name in theirs: # learned positions alone may be more or fewer
                rows = min(len(ours), len(theirs[name]))
                ours[:rows] = theirs[name][:rows]
        if was.block_size != now.block_size:
            tail = "are cut" if now.block_size < was.block_size else "start at random"
            tail = f": the learned positions beyond {tail}" if now.position == "learned" else ""
            print(f"block_size {was.block_size} becomes {now.block_size}{tail}")
        for knob in ("n_ahead", "uncertainty"):
            if bool(getattr(was, knob)) != bool(getattr(now, knob)):
                print(f"{knob} {'starts at random' if getattr(now, knob) else 'is dropped'}")


def forward_flops(module: nn.Module, T: int) -> int:
    return sum(m.flops(T) for m in module.modules() if hasattr(m, "flops"))


def softcap(cap, logits):
    return cap * torch.tanh(logits / cap) # Gemma 2, arXiv:2408.00118


# --- what one forward hands down, and what attention keeps of earlier ones ----------------------------------


class Pass:
    """What belongs to one forward alone: GPT.trunk makes it, every layer gets it, then it is dropped.

    h is (B windows, front + T, C): in each window the thoughts come first, then the text.
    notes   a dict that collects what the modules' own losses need
    stage   how many routers these tokens have passed
    real    (B, T'), False for padding among the tokens that a router let continue; None: no padding
    """
    def __init__(self, idx, start=0, front=0, windows=1, table=None, cache=None, notes=None):
        self.idx, self.start = idx, start # (B, windows T); position of the first token, as Cache.length
        self.front, self.windows, self.table, self.cache = front, windows, table, cache
        self.notes = {} if notes is None else notes
        self.stage, self.real, self.mask = 0, None, None
        self.inputs = [] # with a cache: of the short convolutions so far
        if cache is not None:
            self.places, self.end, self.mask = cache.places_for(start, front + idx.size(1))
            self.recent_at, self.recent = cache.recall(start, self.places, self.end)

    def rotate(self, x):
        """Queries or keys (B, heads, T, D), rotated to their positions."""
        return x if self.table is None else rotate(x, self.table)

    def remember(self, layer, *parts):
        """Keys, values or latents (B, heads, T, width) of the new tokens -> those of all S tokens."""
        return parts if self.cache is None else self.cache.append(layer, self.places, self.end, *parts)

    def before(self, x):
        """What the cache has before the next short convolution's input x (B, T, C): (B, taps - 1, C)."""
        self.inputs.append(x)
        return self.recent[len(self.inputs) - 1].type_as(x)

    def text(self, x):
        """(B windows, front + T, C) -> (B, windows T, C)."""
        return x[:, self.front :].unflatten(0, (len(x) // self.windows, self.windows)).flatten(1, 2)

    def deeper(self, order=None, real=None):
        """The Pass of the T' tokens that continue. order (B, T'): their indices among the T; None: all do."""
        deep = copy.copy(self)
        deep.stage, deep.real = self.stage + 1, real
        if order is not None and self.table is not None: # each token keeps the rotation of its own position
            B, table = len(order), self.table
            table = table.squeeze(1) if table.dim() == 5 else table.expand(B, *table.shape) # (B, T, P/2, 2)
            batch = torch.arange(B, device=order.device)[:, None]
            deep.table = table[batch, order].unsqueeze(1) # (B, 1, T', P/2, 2)
        if self.cache is not None:
            if order is not None:
                deep.places = self.cache.place_table(self.places, self.end).gather(1, order)
            deep.mask = self.cache.enter_stage(deep.stage, deep.places, self.end, real)
        return deep


def quantize(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x (..., width) -> uint8 (..., bytes): integers of 8 or 4 bits and the vector's scale; bits 0 leaves x.
    Each number becomes round(x / scale), at most half a scale away. scale = max |x| / (2^(bits - 1) - 1) is
    stored in bf16, which has the range of fp32: in fp16 a scale could overflow, or become 0.
    """
    if not bits:
        return x
    x, zero = widen(x), 2 ** (bits - 1) # the code of 0: codes are positive
    scale = (x.abs().amax(-1) / (zero - 1)).clamp(min=1e-30).bfloat16()[..., None] # (..., 1)
    code = ((x / scale).round() + zero).to(torch.uint8) # (..., width)
    code = F.pad(code, (0, -x.size(-1) % (16 // bits))) # an even number of bytes: the scale takes two
    if bits == 4: # the first half of the numbers in the low bits, the second half in the high bits
        low, high = code.chunk(2, dim=-1)
        code = low | high << 4
    return torch.cat([code, scale.view(torch.uint8)], dim=-1)


def dequantize(stored: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """What quantize stored -> its numbers (..., width) in fp32; bits 0 leaves what is stored."""
    if not bits:
        return stored
    code, scale = stored[..., :-2], stored.view(torch.bfloat16)[..., -1:].float() # (..., 1)
    if bits == 4:
        code = torch.cat([code & 15, code >> 4], dim=-1)
    return code[..., :width] * scale - 2 ** (bits - 1) * scale # exact: these products have 16 bits


class Cache:
    """What attention and short convolutions keep of earlier tokens.

    layers   per layer the tensors (B, heads, front + capacity, width) that its cache_layout lists. A token at
             position p lies at place front + p in all of them; the thoughts lie in front.
    bits     per layer 0, or 8 or 4: its tensors are then bytes that quantize made
    length   how many tokens count: an int, or (B,) where rows differ. Lowering it rolls back. Or a number on
             the device, (), together with `bucket`.
    bucket   attention reads this many places, whatever the length: shapes are then known without asking the
             device for it, and one CUDA graph serves every length. 0: as many places as count.
    alive    (stages - 1, B, front + capacity): whether the token at a place reached that stage. If not, its
             place holds nothing in the layers of the stage, and the mask hides it.
    memory   (B, heads, segments + 1, slots, width) or None: what a Memory held as each segment began
    recent   (convolutions, B, taps + ring, C): inputs of the short convolutions. First those of the last
             thoughts, or zeros, then a ring of the last tokens: its size does not grow with the text.
             slots (places,) says where each place lies there, earlier (places, taps - 1) the places before
             it, and furthest where the stored text ended.
    """
    ROLLBACK = 16 # tokens that a model with short convolutions can roll back, besides drafts
    BITS = {"auto": 0, "int8": 8, "int4": 4} # choices of cache_dtype

    def __init__(self, layouts, batch_size, capacity, dtype, device, front=0, routers=0, memory=(), conv=(),
                 bits=0):
        # Zeros, not torch.empty: masked places have weight 0, but 0 times a NaN would be NaN.
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        # The last layer is a Memory's, if there is one: it counts documents, so its numbers stay exact.
        self.bits = [bits] * (len(layouts) - bool(memory)) + [0] * bool(memory)
        self.layers = [[quantize(zeros(batch_size, heads, front + capacity, width), bits)
                        for heads, width in layout] for layout, bits in zip(layouts, self.bits)]
        self.capacity, self.front, self.length, self.device, self.dtype = capacity, front, 0, device, dtype
        self.bucket = 0
        self.alive = torch.zeros(routers, batch_size, front + capacity, dtype=torch.bool, device=device)
        self.memory = None
        if memory:
            heads, self.segment, slots, width = memory
            shape = batch_size, heads, capacity // self.segment + 1, slots, width
            self.memory = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        count, C, self.taps, back = conv or (0, 0, 1, capacity) # taps: GPTConfig.conv
        self.ring, self.furthest = min(capacity, self.taps - 1 + back), 0
        self.recent = zeros(count, batch_size, self.taps + self.ring, C)
        position = torch.arange(1 - self.taps - front, capacity, device=device)
        # Thoughts too old for any text share slot 0. It is read once, before anything is stored there.
        slots = self.taps + torch.where(position < 0, position.clamp(-self.taps), position % self.ring)
        self.slots, self.earlier = slots[self.taps - 1 :], slots[:-1].unfold(0, self.taps - 1, 1)

    def end(self, T: int) -> int:
        """How many places attention reads once T more tokens are stored."""
        if self.bucket:
            return self.bucket
        return self.front + T + (int(self.length.max()) if torch.is_tensor(self.length) else self.length)

    def rows(self, part: slice) -> "Cache":
        """A view of some rows, at length 0: what is stored through it is stored in this cache."""
        view = copy.copy(self)
        view.layers, view.length = [[store[part] for store in layer] for layer in self.layers], 0
        view.alive, view.memory = self.alive[:, part], None if self.memory is None else self.memory[part]
        view.recent = self.recent[:, part]
        return view

    def places_for(self, start, T):
        """-> places, end, mask: where T tokens are stored, how many places count, which ones each sees.
        places: a slice, (T,), or (B, T) where rows differ. mask (1 or B, 1, T, S), or None where none is
        needed: a single token sees all before it, and a run from place 0 is plain causal attention.
        """
        first, end, mask = self.front + start, self.end(T), None
        if torch.is_tensor(start): # () or (B,)
            places = first[..., None] + torch.arange(T, device=self.device) # (T,) or (B, T)
            mask = torch.arange(end, device=self.device) <= places.view(-1, 1, T, 1)
            if self.bucket: # as numbers to add, which SDPA would make of them again in every layer
                mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, -torch.inf)
        else:
            places = slice(first, end)
            if first > 0 and T > 1:
                mask = causal_mask(T, end, self.device)
        if len(self.alive): # drafts that were rolled back may have marked these places as alive
            table = self.place_table(places, end)
            self.alive.scatter_(2, table.expand(len(self.alive), -1, -1), False)
        return places, end, mask

    def append(self, layer, places, end, *parts):
        """Stores parts (B, heads, T, width) of a layer -> what it holds up to `end`, (B, heads, S, width)."""
        stores, bits = self.layers[layer], self.bits[layer]
        for store, x in zip(stores, parts):
            x = quantize(x, bits).to(store.dtype)
            if torch.is_tensor(places) and places.dim() == 2: # each token of each row at its own place
                batch = torch.arange(len(x), device=x.device)[:, None]
                store[batch, :, places] = x.transpose(1, 2)
            else:
                store[:, :, places] = x
        return [dequantize(store[:, :, :end], bits, x.size(-1)).type_as(x) for store, x in zip(stores, parts)]

    def recall(self, start, places, end):
        """-> where `keep` stores what convolutions see of new tokens; what they see of the tokens before,
        (convolutions, B, taps - 1, C). One read and one write serve all convolutions.
        """
        if not len(self.recent):
            return None, None
        if not self.bucket: # else only the device knows the length, and nothing is truncated
            goes_on = torch.is_tensor(start) or start > 0
            self.furthest = max(end - self.front, self.furthest if goes_on else 0)
        rows, first = slice(None), self.front + start
        if torch.is_tensor(start): # () or (B,)
            rows, first = torch.arange(self.recent.size(1), device=self.device)[:, None], first.reshape(-1)
        return (rows, self.slots[places][..., -self.ring :]), self.recent[:, rows, self.earlier[first]]

    def keep(self, at, inputs):
        """Stores the inputs (B, T, C) of all convolutions, or of the last tokens if the ring has fewer."""
        if inputs[0].size(1) > self.ring:
            inputs = [x[:, -self.ring :] for x in inputs]
        self.recent[:, at[0], at[1]] = torch.stack(inputs).to(self.recent.dtype)

    def enter_stage(self, stage, places, end, real):
        """Marks the real tokens at these places as alive in a stage -> the mask they need, (B, 1, T', S)."""
        alive = self.alive[stage - 1]
        table = self.place_table(places, end) # (B, T')
        alive.scatter_(1, table, torch.ones_like(table, dtype=torch.bool) if real is None else real)
        mask = alive[:, None, None, :end]
        if table.shape == (1, 1): # decoding one row: every place that is alive lies before it
            return mask
        key, query = torch.arange(end, device=self.device), table[:, None, :, None]
        return mask & (key <= query) | (key == query) # padding sees itself: a softmax over nothing is NaN

    def place_table(self, places, end):
        """Places as a tensor (B, T)."""
        if torch.is_tensor(places):
            return places
        return torch.arange(places.start, end, device=self.device).expand(self.alive.size(1), -1)

    def truncate(self, n: "int | torch.Tensor") -> None:
        """Forget all but the first n tokens; n: an int, or (B,). ValueError if these are not kept."""
        n = n.to(self.device) if torch.is_tensor(n) and n.dim() else int(n)
        wanted = torch.as_tensor(n, device=self.device)
        if (wanted < 0).any() or (wanted > self.length).any():
            raise ValueError(f"cannot keep {n} of {self.length} cached tokens")
        oldest = (wanted + 1 - self.taps).clamp(min=0) # that the next convolution reads, unless wanted is 0
        if ((wanted > 0) & (oldest < self.furthest - self.ring)).any():
            raise ValueError(f"cannot keep {n} of {self.length} cached tokens: short convolutions keep the "
                             f"last {self.ring}; truncate(0), then give the text again")
        self.length = n

    def slide(self, n: int) -> None:
        """Forget all tokens. A memory stays as it was after the first n of them."""
        if self.memory is not None:
            self.memory[:, :, 0] = self.memory[:, :, n // self.segment]
        self.length = 0

    def nbytes(self) -> int:
        """Bytes allocated, as the tensors report them: for its full capacity, whatever the length."""
        rest = [self.alive, self.recent] + ([] if self.memory is None else [self.memory])
        return sum(store.nbytes for store in itertools.chain(*self.layers, rest))


# --- parameters ---------------------------------------------------------------------------------------------
# A few leaf classes own every weight. Each gives its initial values, its forward FLOPs per token,
# and what optim.py needs to know, so that nothing is decided by a name:
#   role     matrix | embedding | head | gate | vector
#   fused    rows of the matrices that are stacked in this one (Muon orthogonalises each by itself)
#   blocks   rows of the blocks that share one second moment in Adam-mini: None = each row, () = the tensor


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
        return project(x, self.weight, self.bias)

    def flops(self, T):
        return 2 * self.in_features * self.out_features


class Embedding(nn.Embedding):
    """ids (...) -> (..., C). Rows ~ N(0, std)."""
    role = "embedding"

    def __init__(self, n, width, std):
        self.std = std
        super().__init__(n, width)

    def reset_parameters(self): # called by nn.Embedding.__init__
        nn.init.normal_(self.weight, std=self.std)


def outer_std(c):
    """Embeddings and head: at any width logits start with spread 0.25, within 0.1 nats of uniform loss."""
    return c.init_std or 0.25 / math.sqrt(c.n_embd)


def linear(c, n_in, n_out, bias=False, **declared):
    """A projection inside a block. With 128 channels, half this start gave a loss 0.03 nats higher."""
    return Linear(n_in, n_out, bias, c.init_std or 1 / math.sqrt(n_in), **declared)


def residual_out(c, n_in):
    """A projection onto the residual stream. 2 n_layer of them add up, hence the smaller start (GPT-2)."""
    std = (c.init_std or 1 / math.sqrt(n_in)) / math.sqrt(2 * c.n_layer)
    return Linear(n_in, c.n_embd, c.bias, std=0.0 if c.zero_init else std)


# --- norm: (..., width) -> (..., width) ---------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / std * w (+ b). Ba et al. 2016, arXiv:1607.06450."""
    role = "vector"

    def __init__(self, width, bias=False, eps=0.0):
        super().__init__(width, eps=eps or 1e-5, bias=bias)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.weight.shape, self.weight.type_as(x), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """y = x / rms(x) * w, rms(x) = sqrt(mean(x^2) + eps). Zhang & Sennrich 2019, arXiv:1910.07467."""
    role = "vector"

    def __init__(self, width, bias=False, eps=0.0): # it has no bias, but shares LayerNorm's signature
        super().__init__(width, eps=eps or 1e-6)

    def forward(self, x):
        return rmsnorm(x, self.weight.type_as(x), self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head (B, heads, T, D): one gain for all queries, one for all keys. arXiv:2010.04245."""
    role = "vector"

    def __init__(self, heads, width):
        super().__init__()
        self.heads = heads # how many query heads, how many key heads
        self.weight = nn.Parameter(torch.ones(2, width))

    def forward(self, x):
        gain = torch.cat([w.expand(n, 1, -1) for w, n in zip(self.weight, self.heads)]) # (heads, 1, D)
        return rmsnorm(x.contiguous(), eps=1e-6) * gain.type_as(x)


NORM = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def norm(c, bias=None):
    """The norm of a sublayer's input, of a stream, or of the head's input."""
    return NORM[c.norm](c.n_embd, c.bias if bias is None else bias, c.norm_eps)


# --- short convolution: (B, T, C) -> (B, T, C) --------------------------------------------------------------


def naive_short_conv(x, w):
    """y_t = x_t + sum_i w_i x_(t-i), before the first place zeros. x (T, C), w (K, C) -> (T, C)."""
    return torch.stack([x[t] + sum(w[i] * x[t - i] for i in range(len(w)) if i <= t) for t in range(len(x))])


class ShortConv(nn.Module):
    """naive_short_conv between a norm and its sublayer: there, and residual, as in Canon layers A and C
    (Allen-Zhu 2025, arXiv:2512.17351). Primer (So et al. 2021, arXiv:2109.08668) convolves queries, keys and
    values. At first w = 0, which is the model without it. Thoughts count as tokens before the text.
    """
    role = "vector"

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c.conv, c.n_embd))

    def forward(self, x, pass_):
        weight, T = self.weight.type_as(x), x.size(1)
        if pass_.cache is None:
            return short_conv(x, weight)
        seen = torch.cat([pass_.before(x), x], dim=1) # (B, K - 1 + T, C)
        if T == 1: # decoding: this takes fewer calls
            return x + (seen * weight.flip(0)).sum(1, keepdim=True)
        return short_conv(seen, weight)[:, -T:]

    def flops(self, T):
        return 2 * self.weight.numel()


class NoConv(nn.Identity):
    def forward(self, x, pass_):
        return x


# --- position -----------------------------------------------------------------------------------------------
# forward(h, start, front) -> (h, table). h (B, T, C) are the token embeddings, start is the first
# token's position. `front` thoughts stand before the text at positions -1, -2, ..., so they shift no token.
# `table` holds the cosines and sines by which Pass.rotate turns queries and keys; None turns nothing.
# `rotates` tells the heads whether they have a rotary width.


def positions(start, T, device):
    """Positions of T tokens: (T,) from one first position, or (B, 1, T) from that of each row, (B,)."""
    steps = torch.arange(T, device=device)
    return start[:, None, None] + steps if torch.is_tensor(start) and start.dim() else start + steps


class Learned(nn.Module):
    """A trained vector per position, added to the token embedding. Radford et al. 2019 (GPT-2)."""
    rotates = False

    def __init__(self, c):
        super().__init__()
        self.table = Embedding(c.block_size, c.n_embd, outer_std(c))

    def forward(self, h, start, front=0):
        last = self.table.num_embeddings - 1 # drafts may lie beyond it, and are then not kept
        vectors = self.table.weight[positions(start, h.size(1), h.device).clamp(max=last)]
        return h + (vectors.squeeze(1) if vectors.dim() == 4 else vectors), None # from (B, 1, T, C) or (T, C)


class Rope(nn.Module):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864).
    Pair i of a query or key at position m is rotated by the angle m base^(-2i/P), so that a score depends on
    the distance of two positions alone. A pair is (2i, 2i+1) as in the paper: its rotation is one complex
    product, which takes fewer passes over memory than Llama's pairs (i, i + P/2). The two differ by a
    permutation of weight rows alone (halves).
    """
    rotates, knobs = True, ("rope_base",)

    def __init__(self, c):
        super().__init__()
        self.width, self.base = c.rotary_width, c.rope_base

    @staticmethod
    def complaints(c):
        if c.rope_base <= 1:
            yield f"rope_base={c.rope_base} must be above 1; 10000 is usual"
        if c.rotary_width % 2:
            yield f"rotary width {c.rotary_width} must be even: pairs rotate; change rope_dim or head_dim"

    def forward(self, h, start, front=0):
        m = positions(start - front, front + h.size(1), h.device).to(widen(h[:0]).dtype)
        return h, rope_table(m, self.width, self.base) # (T, P/2, 2) or (B, 1, T, P/2, 2), for all layers


class NoPosition(nn.Module):
    """Causality alone tells a token where it is. Haviv et al. 2022, arXiv:2203.16634."""
    rotates = False

    def __init__(self, c):
        super().__init__()

    def forward(self, h, start, front=0):
        return h, None


POSITION = {"learned": Learned, "rope": Rope, "none": NoPosition}


# --- attention ----------------------------------------------------------------------------------------------
# forward(x, pass_) -> (B, T, C). A row of the table answers two questions, one class each:
#   where do queries, keys and values come from?   DenseHeads: straight from x. LatentHeads: through a latent.
#   how do softmax maps become an output head?     OneMap: one map each. DiffV1, DiffV2: two maps' difference.
# All heads have keys and values of the same width D, which fused attention kernels ask for. The causal mask
# is in attend for a whole text; Cache.places_for makes it after cached tokens, once for all layers;
# Cache.enter_stage makes it where depths skip tokens; Memory.recall has its own, by segments.


def naive_attention(q, k, v):
    """Attention by its formula. Vaswani et al. 2017; with H > K: Ainslie et al. 2023, arXiv:2305.13245."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1) # (B, K, S, D) -> (B, H, S, D)
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    score = q @ k.mT / math.sqrt(q.size(-1)) # (B, H, T, S)
    T, S = score.shape[-2:]
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T) # queries are the last T of S
    return score.masked_fill(future, -torch.inf).softmax(-1) @ v # (B, H, T, D)


def attend(q, k, v, mask=None, scale=None):
    """naive_attention by PyTorch's fused kernels. q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).
    mask (1 or B, 1, T, S): True where a query sees a key; None: causal. scale: 1/sqrt(D) if None.
    For ALiBi, give it a mask of numbers, which SDPA adds to the scores: (1 or B, H, T, S), -slope (t - s)
    where query t sees key s, -inf elsewhere, built in Pass and Cache where boolean masks are built now, and a
    class in POSITION that rotates nothing. Flash attention takes no such mask.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None and T == S and T > 1: # training and whole prompts: is_causal is the causal mask
        # On CUDA only flash and cuDNN share key heads, in half precision and from capability 8 on. Otherwise
        # keys are copied, because the unfused path would hold T x T scores.
        half = q.dtype in (torch.float16, torch.bfloat16)
        if H != K and q.is_cuda and not (half and torch.cuda.get_device_capability(q.device) >= (8, 0)):
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        return fused_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != k.size(1))
    # SDPA's is_causal aligns at the top left, as if nothing were cached: T < S needs a mask.
    if mask is None and T > 1:
        mask = causal_mask(T, S, q.device)
    # The H/K heads that share a key head become H/K times as many queries: no cached key is copied.
    if mask is not None and H != K and T > 1: # a single query's mask broadcasts
        mask = torch.cat([mask] * (H // K), dim=2) # (1 or B, 1, H/K T, S); repeat() is slower
    q = q.reshape(B, K, H // K * T, D)
    o = fused_attention(q, k, v, attn_mask=mask, scale=scale) # (B, K, H/K T, D)
    return o.reshape(B, H, T, D)


def fused_attention(q, k, v, **options):
    """PyTorch's. On a CPU autocast leaves it alone: in bf16 its backward takes 2 to 3 times as long."""
    with without_autocast(q) if q.is_cpu else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def causal_mask(T, S, device):
    """(1, 1, T, S), True where a query sees a key: the T queries are the last of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


class OneMap(nn.Module):
    """Ordinary attention: each query head is one softmax map, and makes one output head."""
    query_heads = 1 # per head of n_head
    value_halves = 1 # value heads of width D that an output head concatenates

    def __init__(self, c, layer):
        super().__init__()
        self.width = c.n_head * self.query_heads * c.head_width # numbers in all queries of a token

    def attend(self, q, k, v, mask=None): # (B, H, T, D), 2 x (B, K, S, D) -> (B, maps, T, value_halves D)
        return attend(q, k, v, mask)

    def combine(self, o, x): # maps -> output heads; linear in o, so it may work on latents before W_uv
        return o

    def finish(self, o): # (B, T, output heads, value_halves D)
        return o

    def flops(self, T): # scores and mix over the whole context, not its causal half: the usual way to count
        return 2 * T * self.width * (1 + self.value_halves)


def naive_diff_v1(q, k, v, lam, lambda_init):
    """Differential attention, arXiv:2410.05258, section 2.1. H maps -> (B, H/2, T, 2 D)."""
    q1, q2 = q.chunk(2, dim=1) # (B, H/2, T, D): maps h and h + H/2 make output head h
    k1, k2 = k.chunk(2, dim=1) # (B, K/2, S, D)
    v = torch.cat(v.chunk(2, dim=1), dim=-1) # (B, K/2, S, 2 D)
    o = naive_attention(q1, k1, v) - lam * naive_attention(q2, k2, v)
    return F.rms_norm(o, o.shape[-1:], eps=1e-5) * (1 - lambda_init)


class DiffV1(OneMap):
    """naive_diff_v1, with lambda = exp(q1.k1) - exp(q2.k2) + lambda_init, one per layer. n_head counts maps,
    so that all weights keep the shapes of mha with that n_head.
    """
    role = "vector"
    value_halves = 2

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer) # layer counts from 0; the paper's l - 1
        self.eps = c.norm_eps or 1e-5 # the paper's
        self.vectors = nn.Parameter(0.1 * torch.randn(4, c.head_width)) # q1, k1, q2, k2

    @staticmethod
    def complaints(c):
        if c.n_head % 2 or c.kv_heads % 2:
            yield f"n_head={c.n_head} and n_kv_head={c.kv_heads} must be even with diff_form=v1; or use v2"

    def attend(self, q, k, v, mask=None):
        # One call for each half of the value keeps all widths at D. Per output head and token pair it takes
        # 2 maps x 2 calls x 2 D multiplications instead of 2 x (D + 2 D), and still faster than the unfused
        # path that a value of 2 D would take.
        halves = [attend(q, k, torch.cat([half, half], dim=1), mask) for half in v.chunk(2, dim=1)]
        return torch.cat(halves, dim=-1) # (B, H, T, 2 D)

    def combine(self, o, x): # (B, H, T, E) -> (B, H/2, T, E)
        q1, k1, q2, k2 = widen(self.vectors).unbind()
        lam = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init # autocast rounds q1 @ k1
        first, second = widen(o).chunk(2, dim=1) # nearly equal numbers are subtracted, so in fp32
        return (first - lam * second).type_as(o)

    def finish(self, o):
        return F.rms_norm(o, o.shape[-1:], eps=self.eps) * (1 - self.lambda_init)


def naive_diff_v2(q, k, v, lam):
    """The second form (microsoft/unilm, January 2026). q (B, 2 H, T, D), lam (B, H, T, 1) -> (B, H, T, D)."""
    return naive_attention(q[:, 0::2], k, v) - lam * naive_attention(q[:, 1::2], k, v)


class DiffV2(OneMap):
    """naive_diff_v2, with lambda = sigmoid(W x), one per token and head. Only queries are doubled."""
    query_heads = 2

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.gate = linear(c, c.n_embd, c.n_head, role="gate")

    def combine(self, o, x): # (B, 2H, T, E), (B, T, C) -> (B, H, T, E)
        lam = widen(self.gate(x)).sigmoid() # (B, T, H)
        lam = lam.transpose(1, 2).unsqueeze(-1) # (B, H, T, 1)
        first, second = widen(o).unflatten(1, (-1, 2)).unbind(2) # (B, H, T, E) each
        return (first - lam * second).type_as(o)


DIFF_FORM = {"v1": DiffV1, "v2": DiffV2}


def difference(c, layer): # DiffV1 or DiffV2
    return DIFF_FORM[c.diff_form](c, layer)


difference.knobs = ("diff_form",) # as a class of the table would declare them


class DenseHeads(nn.Module):
    """Queries, keys and values straight from x. The cache holds K keys and K values per token and layer."""
    knobs = ("n_kv_head",)
    rotary_width = staticmethod(lambda c: c.head_width)

    def __init__(self, c, layer, maps):
        super().__init__()
        self.layer, self.maps = layer, maps
        self.D, self.K, self.Q = c.head_width, c.kv_heads, c.n_head * maps.query_heads # Q query heads
        q, k = self.Q * self.D, self.K * self.D # rows of queries; rows of keys, and of values
        shared = (self.D,) * (self.Q + self.K) + (1,) * k # Adam-mini: queries and keys by head, values by row
        self.qkv = linear(c, c.n_embd, q + 2 * k, c.bias, fused=(q, k, k), blocks=shared)
        self.norm = HeadNorm((self.Q, self.K), self.D) if c.qk_norm else nn.Identity()
        self.out = residual_out(c, c.n_head * self.D)
        self.cache_layout = ((self.K, self.D), (self.K, self.D)) # heads and width of each cached tensor

    def forward(self, x, pass_):
        heads = self.qkv(x).unflatten(-1, (-1, self.D)) # (B, T, Q + 2 K, D)
        heads = heads.transpose(1, 2) # (B, Q + 2 K, T, D)
        qk, v = heads.split([self.Q + self.K, self.K], dim=1) # v (B, K, T, D)
        qk = pass_.rotate(self.norm(qk)) # queries and keys at once: half as many small operations
        q, k = qk.split([self.Q, self.K], dim=1) # (B, Q, T, D), (B, K, T, D)
        k, v = pass_.remember(self.layer, k, v) # (B, K, S, D); a cached key keeps its rotation
        o = self.maps.attend(q, k, v, pass_.mask) # (B, maps, T, E)
        o = self.maps.combine(o, x) # (B, output heads, T, E)
        o = self.maps.finish(o.transpose(1, 2)) # (B, T, output heads, E)
        return self.out(o.flatten(2)) # (B, T, C)


def naive_latent_keys(c, r, w_uk, w_uv):
    """MLA's keys and values: c (B, S, R), r (B, S, P), w_uk (H, U, R), w_uv (H, D, R) -> 2 x (B, H, S, D)."""
    k = torch.einsum("bsr,hur->bhsu", c, w_uk) # (B, H, S, U), without position
    r = r.unsqueeze(1).expand(-1, k.size(1), -1, -1) # (B, H, S, P): all heads share the rotary key
    v = torch.einsum("bsr,hdr->bhsd", c, w_uv) # (B, H, S, D)
    return torch.cat([k, r], dim=-1), v # attention proper follows, by any of the naive forms


class LatentHeads(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 2024, arXiv:2405.04434, section 2.1).

    x is projected to a latent c (R numbers, normed) and one rotary key r (P numbers) that all heads share:
    only these R + P numbers are cached. Per head: key [W_uk c, r], value W_uv c, query [q_n, q_r], where q_n
    has U = D - P numbers. Two ways lead to the same result, and the one with fewer multiplications is taken:
      expanded   naive_latent_keys for all S tokens, then attention as usual: training and long prompts
      absorbed   scores q_n (W_uk c) as (q_n W_uk) c, mixes latents, and lifts only the mixture by W_uv:
                 decoding. Differential maps are subtracted as latents: each output head is lifted once.
    No norm may stand between W_uk and the score: it could not be absorbed.
    """
    knobs = ("kv_rank", "q_rank", "rope_dim")
    rotary_width = staticmethod(lambda c: c.rope_dim or c.head_width // 2)

    def __init__(self, c, layer, maps):
        super().__init__()
        self.layer, self.maps = layer, maps
        self.H, self.D, self.R, self.P = c.n_head, c.head_width, c.latent_rank, c.rotary_width
        self.U, self.Q = self.D - self.P, self.H * maps.query_heads # U unrotated width, Q query heads
        self.q_down = linear(c, c.n_embd, c.q_rank) if c.q_rank else nn.Identity()
        self.q_latent_norm = RMSNorm(c.q_rank) if c.q_rank else nn.Identity()
        self.q_up = linear(c, c.q_rank or c.n_embd, self.Q * self.D, blocks=(self.D,) * self.Q)
        self.kv_down = linear(c, c.n_embd, self.R + self.P)
        self.kv_norm = RMSNorm(self.R)
        blocks = ((self.U,) + (1,) * self.D) * self.H # per head: U rows of W_uk, then D rows of W_uv
        self.kv_up = linear(c, self.R, self.H * (self.U + self.D), blocks=blocks)
        norms = (RMSNorm(w) if c.qk_norm and w else nn.Identity() for w in (self.D, self.P))
        self.norm_q, self.norm_r = norms
        self.out = residual_out(c, self.H * self.D)
        self.cache_layout = ((1, self.R + self.P),)

    @staticmethod
    def complaints(c):
        if c.rope_dim and not c.rotary_width:
            yield f"rope_dim={c.rope_dim} needs position=rope; drop it or change that"
        if c.rotary_width > c.head_width - 2:
            yield f"rope_dim={c.rotary_width} must leave at least 2 of head_dim={c.head_width}; lower it"
        if c.latent_rank < 1:
            yield f"n_embd={c.n_embd} leaves no latent of n_embd // 4; set kv_rank, or raise n_embd"
        if c.latent_rank % 2 or c.head_width % 2: # the pairs that rotate lie after them
            yield f"kv_rank={c.latent_rank} and head_dim={c.head_width} must be even with {c.attention}"

    def forward(self, x, pass_):
        q = self.q_up(self.q_latent_norm(self.q_down(x))) # (B, T, Q D)
        q = self.norm_q(q.unflatten(-1, (self.Q, self.D))) # (B, T, Q, D)
        q_n, q_r = q.transpose(1, 2).split([self.U, self.P], dim=-1) # (B, Q, T, U), (B, Q, T, P)
        c, r = self.kv_down(x).unsqueeze(1).split([self.R, self.P], dim=-1) # (B, 1, T, R), (B, 1, T, P)
        q_r, r = pass_.rotate(q_r), pass_.rotate(self.norm_r(r))
        latent = torch.cat([self.kv_norm(c), r], dim=-1) # (B, 1, T, R + P)
        (latent,) = pass_.remember(self.layer, latent) # (B, 1, S, R + P)
        attend_ = self.absorbed if self.absorbing_pays(x.size(1), latent.size(2)) else self.expanded
        o = attend_(q_n, q_r, latent, x, pass_.mask) # (B, T, output heads, E)
        return self.out(self.maps.finish(o).flatten(2)) # (B, T, C)

    def absorbing_pays(self, T, S):
        """Whether absorbed takes fewer multiplications for T new tokens among S. T = S is left to flash."""
        expanded = S * self.R * self.H * (self.U + self.D) + T * S * self.Q * 2 * self.D
        absorbed = T * self.R * (self.Q * self.U + self.H * self.D) + T * S * self.Q * 2 * (self.R + self.P)
        return (T == 1 or T < S) and absorbed < expanded

    def expanded(self, q_n, q_r, latent, x, mask):
        c, r = latent.split([self.R, self.P], dim=-1)
        kv = self.kv_up(c.squeeze(1)).unflatten(-1, (self.H, -1)) # (B, S, H, U + D)
        k_n, v = kv.transpose(1, 2).split([self.U, self.D], dim=-1) # (B, H, S, U), (B, H, S, D)
        q = torch.cat([q_n, q_r], dim=-1) # (B, Q, T, D)
        k = torch.cat([k_n, r.expand(-1, self.H, -1, -1)], dim=-1) # (B, H, S, D): all heads share r
        o = self.maps.attend(q, k, v, mask) # (B, maps, T, E)
        return self.maps.combine(o, x).transpose(1, 2)

    def absorbed(self, q_n, q_r, latent, x, mask):
        w = self.kv_up.weight.unflatten(0, (self.H, -1)) # (H, U + D, R)
        w_uk, w_uv = w.split([self.U, self.D], dim=1)
        q_n = q_n.unflatten(1, (self.H, -1)) # (B, H, maps of a head, T, U)
        q_c = torch.einsum("bhjtu,hur->bhjtr", q_n, w_uk).flatten(1, 2) # (B, Q, T, R)
        q = torch.cat([q_c, q_r], dim=-1) # (B, Q, T, R + P)
        # One key head serves all queries. Its values are the keys too, and the last P columns of the mixture
        # are dropped: all widths are then equal, and the cache needs no copy. The scale is expanded's.
        o = attend(q, latent, latent, mask, scale=self.D**-0.5)[..., : self.R] # (B, Q, T, R)
        o = self.maps.combine(o, x) # (B, output heads, T, R)
        w_uv = w_uv.unflatten(0, (self.maps.value_halves, -1)) # value halves first: heads h and h + H/2
        return torch.einsum("bhtr,ghdr->bthgd", o, w_uv).flatten(3)


ATTENTION = {
    "mha": (DenseHeads, OneMap),
    "mla": (LatentHeads, OneMap),
    "diff": (DenseHeads, difference),
    # Both maps of a difference attend to the latent that mla caches, so the cache is as small as mla's: R + P
    # numbers per token and layer. What v2 doubles is queries, and queries are not cached.
    "diff_mla": (LatentHeads, difference),
}


# --- activation and MLP: (B, T, C) -> (B, T, C) -------------------------------------------------------------


class Activation(nn.Module):
    """A row of kernels.ACTIVATIONS, where the formulas are. crrelu learns an epsilon per layer, from 0.01."""
    role = "vector"

    def __init__(self, c):
        super().__init__()
        self.name, self.act = c.activation, gated_pair if c.glu else activate
        self.eps = nn.Parameter(torch.tensor([0.01])) if c.activation == "crrelu" else None

    def forward(self, x): # (..., F) -> (..., F); with glu, gate and up side by side: (..., 2 F) -> (..., F)
        return self.act(x, self.name, self.eps if self.eps is None else self.eps[0])


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
    """down(act(gate x) * up x): SwiGLU with silu, GEGLU with gelu. Shazeer 2020, arXiv:2002.05202."""
    def __init__(self, c):
        super().__init__()
        # gate and up are one matrix; gate's rows come first
        self.gate_up = linear(c, c.n_embd, 2 * c.hidden, c.bias, fused=(c.hidden, c.hidden))
        self.activation = Activation(c)
        self.down = residual_out(c, c.hidden)

    def forward(self, x):
        return self.down(self.activation(self.gate_up(x)))


GLU = {False: MLP, True: GatedMLP}


# --- residual -----------------------------------------------------------------------------------------------
# What carries h from sublayer to sublayer. read(h) returns a sublayer's input, and `mix`, which
# write needs. Plain carries h (B, T, C); the others N streams (B, T, N, C), mixed anew around each sublayer.
# All streams start equal, which makes the model the plain one. Each sublayer mostly reads one of them, in
# turn, and writes to all: if all were read alike, their gradients would be equal and they would stay copies.


def naive_streams(x, f, pre, post, res):
    """A token's streams x (N, C) around the sublayer f (C,) -> (C,). pre (N,), post (N,), res (N, N)."""
    y = f(sum(pre[i] * x[i] for i in range(len(x))))
    return torch.stack([sum(res[o, i] * x[i] for i in range(len(x))) + post[o] * y for o in range(len(x))])


class Plain(nn.Module):
    """h + f(h). He et al. 2015, arXiv:1512.03385."""
    usual_streams = 1
    expand = staticmethod(lambda h, N: h) # before the first block: (B, T, C) -> the stream(s)
    reduce = staticmethod(lambda h: h) # after the last block: the stream(s) -> (B, T, C)

    def __init__(self, c, sublayer):
        super().__init__()

    def read(self, h):
        return h, None

    def write(self, h, y, mix):
        return h + y


class Streams(nn.Module):
    """naive_streams for all tokens at once: X (B, T, N, C) -> H_res X + H_post y, where y = f(H_pre X). A
    subclass makes pre (B, T, N), post (B, T, N) and res (B, T, N, N) [out, in] from each token's X, in fp32.
    """
    role, usual_streams, knobs = "vector", 4, ("n_stream",)
    expand = staticmethod(lambda h, N: h.unsqueeze(2).expand(-1, -1, N, -1).contiguous()) # (B, T, N, C)
    reduce = staticmethod(lambda h: h.mean(2)) # the papers sum; the norm that follows hides the difference

    def read(self, h):
        with without_autocast(h):
            pre, post, res = self.coefficients(widen(h))
            return read_streams(h, pre), (post, res) # (B, T, C)

    def write(self, h, y, mix):
        with without_autocast(h): # it would round the product of matrices to half precision
            return write_streams(h, y, *mix) # (B, T, N, C)

    def flops(self, T):
        return 2 * self.N * (self.N + 1) * self.C # H_pre X and H_res X


def without_autocast(x):
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type) # the meta device has none
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


class Hyper(Streams):
    """Hyper-connections (Zhu et al. 2024, arXiv:2409.19606, section 2.2): static coefficients, and for each
    stream a part of the token's own, tanh(norm(X) W) times a learned scale.
    """
    def __init__(self, c, sublayer):
        super().__init__()
        self.N, self.C = N, C = c.streams, c.n_embd
        self.norm = norm(c, bias=False)
        self.dynamic = Linear(C, N + 2, False, std=0.0, role="gate") # to pre, to post, to the N outputs
        self.pre, self.post = nn.Parameter(torch.eye(N)[sublayer % N]), nn.Parameter(torch.ones(N))
        self.res = nn.Parameter(torch.eye(N))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def coefficients(self, h): # h is fp32, even if the weights are bf16
        dynamic = F.linear(self.norm(h), self.dynamic.weight.type_as(h)).tanh() # (B, T, N, 2 + N)
        pre, post, res = dynamic.split([1, 1, h.size(2)], dim=-1) # res (B, T, N, N) [in, out]
        s = self.scale
        pre = self.pre + s[0] * pre.squeeze(-1) # (B, T, N)
        post = self.post + s[1] * post.squeeze(-1) # (B, T, N)
        return pre, post, self.res + s[2] * res.mT

    def flops(self, T):
        return super().flops(T) + (self.N - 1) * self.dynamic.flops(T) # the Linear counts one stream itself


class BySinkhorn(nn.Module):
    """Doubly stochastic (..., N, N) from N^2 logits: rows exactly, columns as far as the iterations get."""
    knobs = ("sinkhorn_iters",)

    def __init__(self, c):
        super().__init__()
        self.iters, self.start = c.sinkhorn_iters, 3.0 * torch.eye(c.streams).flatten() # near the identity

    @staticmethod
    def complaints(c):
        if c.sinkhorn_iters < 1:
            yield f"sinkhorn_iters={c.sinkhorn_iters} must be at least 1; 20 is usual"

    def forward(self, h, phi, alpha, b): # -> pre, post (B, T, N), res (B, T, N, N)
        return mhc_coefficients(h, phi, alpha, b, self.iters)


class ByPermutations(nn.Module):
    """Doubly stochastic and exact: the mean of all N! permutation matrices by softmax. arXiv:2601.05732."""
    def __init__(self, c):
        super().__init__()
        orders = torch.tensor(list(itertools.permutations(range(c.streams)))) # (N!, N), the identity first
        self.register_buffer("matrices", torch.eye(c.streams)[orders], persistent=False) # (N!, N, N)
        self.start = torch.zeros(len(orders))
        self.start[0] = 3.0 + math.log(len(orders) / c.streams) # as near to the identity as BySinkhorn

    @staticmethod
    def complaints(c):
        if c.streams > 4:
            yield f"n_stream={c.streams} makes {c.streams}! permutations; use at most 4, or h_res=sinkhorn"

    def forward(self, h, phi, alpha, b):
        pre, post, z = mhc_gates(h, phi, alpha, b) # (B, T, N), (B, T, N), (B, T, N!)
        res = z.softmax(-1) @ self.matrices.flatten(1).type_as(z) # (B, T, N^2)
        return pre, post, res.unflatten(-1, self.matrices.shape[1:])

    def flops(self, T):
        return 2 * self.matrices.numel()


H_RES = {"sinkhorn": BySinkhorn, "permutations": ByPermutations}


class Manifold(Streams):
    """Manifold-constrained hyper-connections (Xie et al. 2025, arXiv:2512.24880, section 4).
    z = alpha * (norm(flat X) Phi) + b, where alpha scales the token's own part alone. H_pre = sigmoid(z),
    H_post = 2 sigmoid(z), and H_res is z made doubly stochastic. A product of such matrices is one too, so
    through any number of layers H_res neither grows nor shrinks what it mixes.
    """
    knobs = ("n_stream", "h_res")

    def __init__(self, c, sublayer):
        super().__init__()
        self.N, self.C = N, C = c.streams, c.n_embd
        self.mixing = H_RES[c.h_res](c)
        self.widths = [N, N, len(self.mixing.start)]
        self.phi = Linear(N * C, sum(self.widths), False, std=0.0, role="gate")
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        # Equal streams read with shares that sum to 1 are the plain model: 0.7 of one, 0.3 of the others.
        shares = torch.full((N,), 0.3 / max(1, N - 1)).index_fill(0, torch.tensor(sublayer % N), 0.7)
        self.b = nn.Parameter(torch.cat([shares.logit(), torch.zeros(N), self.mixing.start]))

    def coefficients(self, h):
        return self.mixing(h, self.phi.weight, self.alpha, self.b)


RESIDUAL = {"plain": Plain, "hyper": Hyper, "mhc": Manifold}


# --- extras -------------------------------------------------------------------------------------------------
# Parts around and inside the trunk. Each declares
#   place      where GPT puts it: in front of the text | between two blocks | above a stage | beside the trunk
#   loss_name  if it has a loss of its own: loss(model, h, idx, targets, notes), given beside ce in train mode
#   detached   if it learns from detached numbers: optim.py and train.py keep its parameters apart


class Thoughts(nn.Module):
    """Learned vectors in front of the text, which every token sees: registers (Darcet et al. 2023,
    arXiv:2309.16588), for text. They depend on no token, so they leak nothing. None is ever predicted.
    """
    place, role = "in front of the text", "embedding"

    def __init__(self, c):
        super().__init__()
        self.vectors = nn.Parameter(outer_std(c) * torch.randn(c.thought_tokens, c.n_embd))

    def forward(self, h): # (B, T, C) -> (B, front + T, C)
        return torch.cat([self.vectors.expand(h.size(0), -1, -1).type_as(h), h], dim=1)


class Between(nn.Module):
    """One more sublayer, between two blocks: h + body(norm(h)), on whatever streams there are."""
    def __init__(self, c, body, sublayer):
        super().__init__()
        self.residual, self.norm = RESIDUAL[c.residual](c, sublayer), norm(c)
        self.body = body
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, pass_):
        x, mix = self.residual.read(h)
        return self.residual.write(h, self.dropout(self.body(self.norm(x), pass_)), mix)


def naive_memory(slots, keep, keys, values, held):
    """What M slots hold after a segment. slots (M, D), keep (M,), keys and values (G, D), held (M, 2 D)."""
    score = slots @ keys.T / math.sqrt(keys.size(1)) # (M, G)
    w = torch.cat([keep[:, None], score], dim=1).softmax(1) # (M, 1 + G)
    return w[:, :1] * held + w[:, 1:] @ torch.cat([keys, values], dim=1) # (M, 2 D)


class Memory(nn.Module):
    """Attention to the text beyond the window, through M slots that every segment of G tokens updates.

    As a segment ends, each slot attends, with its learned query, to the segment's tokens and to what it holds
    (naive_memory). Tokens of later segments attend to the slots as to M more tokens, and to `nothing`, whose
    value is 0: its weight is the gate. Slots are normalised when recalled, so that slots filled with small
    weights count equally. What a memory holds is a function of the text alone; document_token empties it. In
    the line of the Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881), whose slots pass
    through all layers.
    """
    place, remembers = "between two blocks", True
    role, knobs = "vector", ("memory_segment", "document_token")

    def __init__(self, c):
        super().__init__()
        self.H, self.D, self.M, self.G = c.n_head, c.head_width, c.memory_slots, c.segment
        self.layer, self.document = c.n_layer, c.document_token # in the cache it comes after the blocks
        width = self.H * self.D
        blocks = (self.D,) * (2 * self.H) + (1,) * width
        self.qkv = linear(c, c.n_embd, 3 * width, c.bias, fused=(width,) * 3, blocks=blocks)
        # Both starts decide whether recall is learned (bench.py eval RUN recall). Sharp queries: a slot takes
        # few tokens, not the mean of all. Spread keeps: each segment empties some slots much, others little.
        self.slots = nn.Parameter(3 * torch.randn(self.H, self.M, self.D))
        self.keep = nn.Parameter(math.log(self.G) + torch.linspace(-1, 4, self.M).repeat(self.H, 1))
        self.nothing = nn.Parameter(torch.zeros(self.H, 1, self.D))
        self.out = residual_out(c, width)
        self.cache_layout = ((self.H, self.D), (self.H, self.D), (1, 1)) # keys, values, where documents begin
        self.memory_layout = (self.H, self.G, self.M, 2 * self.D)

    @staticmethod
    def complaints(c):
        if (c.block_size // 2) % c.segment:
            yield f"memory_segment={c.segment} must divide half of block_size={c.block_size}; change either"
        if not -1 <= c.document_token < c.vocab_size:
            yield f"document_token={c.document_token} must be below vocab_size={c.vocab_size}; -1 is none"

    def forward(self, x, pass_):
        if not pass_.idx.size(1): # thoughts without text
            return torch.zeros_like(x)
        qkv = self.qkv(pass_.text(x)).unflatten(-1, (-1, self.D)) # (B, T, 3 H, D)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1) # (B, H, T, D) each
        begins = (pass_.idx == self.document)[:, None, :, None].type_as(k) # (B, 1, T, 1): a document begins
        if pass_.cache is not None: # all S tokens of the window, without the thoughts in front of them
            stored = pass_.remember(self.layer, k, v, begins)
            k, v, begins = (part[:, :, pass_.cache.front :] for part in stored)
        begins = begins[:, 0, :, 0] # (B, S)
        first, held = self.fill(k, v, begins, pass_)
        o = self.out(self.recall(q, held, first, begins, pass_)) # (B, windows T, C)
        o = o.unflatten(1, (pass_.windows, -1)).flatten(0, 1) # (B windows, T, C)
        return F.pad(o, (0, 0, pass_.front, 0)) # nothing is added to the thoughts

    def fill(self, k, v, begins, pass_):
        """naive_memory for the n segments that these tokens complete. k, v (B, H, S, D), begins (B, S) ->
        `first`, the segment of the first new token, and what the slots hold as each segment from there on
        begins, (B, H, n + 1, M, 2 D).
        """
        G, start, cache = self.G, pass_.start, pass_.cache
        first = (int(start.min()) if torch.is_tensor(start) else start) // G
        end = k.size(2) // G
        if cache is None:
            held = [k.new_zeros(len(k), self.H, self.M, 2 * self.D, dtype=widen(k[:0]).dtype)]
        else:
            held = [cache.memory[:, :, first]]
        if end > first:
            part = slice(first * G, end * G)
            kv = torch.cat([k, v], dim=-1)[:, :, part].unflatten(2, (-1, G)) # (B, H, n, G, 2 D)
            begins = begins[:, None, part].unflatten(2, (-1, 1, G)) # (B, 1, n, 1, G)
            score = torch.einsum("hmd,bhngd->bhnmg", self.slots.type_as(k), kv[..., : self.D])
            score = widen(score / math.sqrt(self.D)) # (B, H, n, M, G)
            # Where a document begins, slots keep nothing, and only the segment's last document counts.
            keep = self.keep[:, None, :, None].expand(*score.shape[:-1], 1) # (B, H, n, M, 1)
            keep = keep.masked_fill(begins.sum(-1, keepdim=True) > 0, -torch.inf)
            later = begins.flip(-1).cumsum(-1).flip(-1) - begins # documents that begin after each token
            score = score.masked_fill(later > 0, -torch.inf)
            w = torch.cat([keep, score], dim=-1).softmax(-1) # (B, H, n, M, 1 + G)
            taken = w[..., 1:] @ widen(kv) # (B, H, n, M, 2 D)
            for n in range(end - first):
                held.append(w[:, :, n, :, :1] * held[-1] + taken[:, :, n])
        held = torch.stack(held, dim=2)
        if cache is not None:
            cache.memory[:, :, first : end + 1] = held
        return first, held

    def recall(self, q, held, first, begins, pass_):
        """q (B, H, T, D) attends to what the slots held as its token's segment began -> (B, T, H D)."""
        (B, H, T, _), n = q.shape, held.size(2)
        position = positions(pass_.start, T, q.device).reshape(-1, T).expand(B, T)
        segment = position // self.G # (B, T)
        # Has a document begun since the token's segment did? Then the slots belong to another document.
        begun = F.pad(begins.cumsum(1, dtype=torch.long), (1, 0)) # (B, 1 + S); bf16 would count to 256 only
        same = begun.gather(1, position + 1) == begun.gather(1, segment * self.G) # (B, T)
        # The slots of all segments lie side by side, and each token sees those of its own segment.
        owner = first + torch.arange(n, device=q.device).repeat_interleave(self.M) # (n M,)
        mask = (segment[..., None] == owner) & same[..., None] # (B, T, n M)
        mask = F.pad(mask, (1, 0), value=True)[:, None] # (B, 1, T, 1 + n M): `nothing` is seen by all
        kv = rmsnorm(held.flatten(2, 3).unflatten(-1, (2, self.D))).type_as(q) # (B, H, n M, 2, D)
        k, v = kv.unbind(3)
        k = torch.cat([self.nothing.type_as(q).expand(B, -1, -1, -1), k], dim=2) # (B, H, 1 + n M, D)
        o = fused_attention(q, k, F.pad(v, (0, 0, 1, 0)), attn_mask=mask) # (B, H, T, D)
        return o.transpose(1, 2).flatten(2)

    def flops(self, T): # as if each token attended to M slots, and each slot to each token
        return 4 * self.H * self.D * self.M + 2 * self.H * self.D * 3 * self.M


class Peek(nn.Module):
    """An MLP predicts the mean embedding of the next n tokens, each of unit size. The layers above get the
    prediction, gated. Its own loss compares it with what came, to which no gradient flows. LEPTON's idea, but
    the future is predicted and not looked at.
    """
    place, remembers, loss_name = "between two blocks", False, "peek"

    def __init__(self, c):
        super().__init__()
        self.n = c.future_peek
        self.up, self.down = linear(c, c.n_embd, 2 * c.n_embd), linear(c, 2 * c.n_embd, c.n_embd)
        self.gate, self.out = linear(c, c.n_embd, 1, role="gate"), residual_out(c, c.n_embd)

    @staticmethod
    def complaints(c):
        if c.future_peek >= c.block_size:
            yield f"future_peek={c.future_peek} must be below block_size={c.block_size}; 8 is usual"

    def forward(self, x, pass_):
        hint = self.down(activate(self.up(x), "relu2"))
        pass_.notes["peek"] = pass_.text(hint) # (B, T, C)
        return self.gate(x).sigmoid() * self.out(hint.detach())

    def loss(self, model, h, idx, targets, notes):
        """Squared error over the mean square of the true means: 1 for a prediction of 0, 0 if perfect."""
        known = (targets >= 0).unsqueeze(-1) # (B, T, 1)
        table = F.rms_norm(widen(model.embed.weight.detach()), (h.size(-1),)) # (V, C)
        e = table[targets.clamp(min=0)] * known # (B, T, C)
        e = torch.cat([e, known.type_as(e)], dim=-1) # the last column counts the tokens of a sum
        sums = F.pad(e, (0, 0, 0, self.n - 1)).unfold(1, self.n, 1).sum(-1) # (B, T, C + 1)
        count = sums[..., -1:]
        mean = sums[..., :-1] / count.clamp(min=1)
        error = (widen(notes["peek"])[:, : idx.size(1)] - mean) * (count > 0)
        return error.square().sum() / mean.square().sum().clamp(min=1e-6)


class Router(nn.Module):
    """Lets each token decide, from its own state, whether it stops or continues to the next stage of layers.

    One rule, score > 0, holds in training and in decoding. Tokens that continue are gathered, so nothing is
    computed for the others; they keep their positions and attend to each other only. What a stage adds to
    them is multiplied by p = sigmoid(score), through which the score learns from the loss. A loss of its own
    holds the mean depth, through the same sigmoid (straight-through). In the line of Mixture-of-Depths
    (Raposo et al. 2024, arXiv:2404.02258), whose top-k over the sequence is not causal.
    """
    place, loss_name, knobs = "above a stage", "depth", ("mean_depth",)

    def __init__(self, c, stage):
        super().__init__()
        self.reduce, (below, above) = RESIDUAL[c.residual].reduce, c.stage_depths[stage : stage + 2]
        self.layers, self.first, self.target = above - below, c.stage_depths[0], c.target_depth
        self.norm, self.gate = norm(c), linear(c, c.n_embd, 1, True, role="gate")

    @staticmethod
    def complaints(c):
        if sorted({*c.depths, c.n_layer}) != list(c.depths) or c.depths[0] < 1 or len(c.depths) < 2:
            yield f"depths={c.depths} must rise from at least 1 to n_layer={c.n_layer}, as (2, 4, 8) to 8"
        elif not c.depths[0] <= c.target_depth <= c.n_layer:
            yield f"mean_depth={c.mean_depth} must lie between {c.depths[0]} and {c.n_layer}, as depths do"

    def forward(self, h, pass_, stage):
        """h (B, T, ...) below a stage -> above all stages. stage(h, pass_) runs the tokens that continue."""
        x, T = self.reduce(h), h.size(1)
        score = self.score(x) # (B, T)
        go = score > 0 if pass_.real is None else (score > 0) & pass_.real
        if pass_.cache is None: # mean number of layers of a token so far, for the loss
            depth = pass_.notes.get("depth", self.first)
            pass_.notes["depth"] = depth + self.layers * self.share(x, go, pass_)
        if pass_.front:
            go = go | (torch.arange(T, device=go.device) < pass_.front) # thoughts reach all stages
        # A Python list, because the shapes of the next stage depend on it.
        counts = [T] * len(go) if go.is_meta else go.sum(1).tolist()
        most = max(counts, default=0)
        if most == 0:
            return h
        p = score.sigmoid()
        if most == T and len(go) == 1: # every token of a single row, as usual in decoding: no need to gather
            return blend(h, stage(h, pass_.deeper()), p)
        order = go.sort(dim=1, descending=True, stable=True).indices # tokens that continue come first
        order = order[:, :most] # (B, T')
        batch = torch.arange(len(go), device=go.device)[:, None]
        real = go[batch, order] # False where a row has fewer than T'
        gathered = h[batch, order] # (B, T', ...)
        deep = stage(gathered, pass_.deeper(order, real))
        return h.index_put((batch, order), blend(gathered, deep, p[batch, order] * real))

    def score(self, x):
        return widen(self.gate(self.norm(x))).squeeze(-1)

    def share(self, x, go, pass_):
        """Share of text tokens that continue. Its gradient is the sigmoid's, and moves the router alone."""
        soft = self.score(x.detach()).sigmoid() if torch.is_grad_enabled() else go.float()
        share = go + soft - soft.detach()
        share = share if pass_.real is None else share * pass_.real
        return share[:, pass_.front :].sum() / pass_.idx.numel()

    def loss(self, model, h, idx, targets, notes):
        """Squared distance of the mean depth from the one asked for, in layers."""
        return (notes["depth"] - self.target).square()


def blend(h, deep, p):
    """h + p (deep - h), with one p (B, T) per token."""
    return torch.lerp(h, deep, p.view(*p.shape, *[1] * (h.dim() - 2)).type_as(h))


# Most logits of Ahead.loss held at once: 16 MB a copy on a CPU, 1 GB on CUDA, about six copies alive.
_AHEAD_LOGITS, _AHEAD_LOGITS_CUDA = 2**22, 2**28


class Ahead(nn.Module):
    """Drafts the tokens after the next from the trunk's output h_t and the tokens drafted so far.

    s_0 = h_t, and s_i = s_(i-1) + W_down relu2(W_up [norm s_(i-1), norm e(x_(t+i))]), from which the model's
    own head predicts x_(t+i+1). One cell serves all i. The norms need no gains, since W_up follows.
    Each draft depends on the one before, as in Hydra (Ankner et al. 2024, arXiv:2402.05109): four tokens on,
    it has 0.75 of the model's probability; independent heads (Medusa, arXiv:2401.10774) have 0.3. Only the
    cell is trained: trunk, embedding and head are detached. It is trained half as deep as it drafts: trained
    4 deep or 6 deep, equally many of 8 drafts are kept.
    """
    place, loss_name, detached = "beside the trunk", "ahead", True

    def __init__(self, c):
        super().__init__()
        self.depth, self.head_flops = (c.n_ahead + 1) // 2, 2 * c.n_embd * c.vocab_size
        self.up = linear(c, 2 * c.n_embd, 4 * c.n_embd)
        self.down = Linear(4 * c.n_embd, c.n_embd, False, std=0.0)

    @staticmethod
    def complaints(c):
        if c.n_ahead >= c.block_size:
            yield f"n_ahead={c.n_ahead} must be below block_size={c.block_size}; 7 is usual"

    def forward(self, s, e): # (..., C), (..., C) -> (..., C)
        both = rmsnorm(torch.stack([s, e], dim=-2)).flatten(-2) # (..., 2 C)
        hidden = F.relu(project(both, self.up.weight)).square() # calling modules would take 8 of 50 us
        return s + project(hidden, self.down.weight)

    def loss(self, model, h, idx, targets, notes):
        """Mean cross-entropy, in nats, against the model's own distribution, by which drafts will be judged:
        of 8 drafts 2.3 are kept, but 1.9 if the cell learns the text's tokens (frozen trunk, one seed). With
        a quarter of the rows, as here, a training step takes 1.18 times as long as without the cell.
        """
        few = max(1, len(h) // 4)
        h, idx, targets = h[:few].detach(), idx[:few], targets[:few]
        s, guesses, counts = h, [], []
        for i in range(1, min(self.depth, idx.size(1) - 1) + 1):
            s = self(s[:, :-1], F.embedding(idx[:, i:], model.embed.weight.detach())) # (B, T - i, C)
            guesses.append(F.pad(s, (0, 0, i, 0))) # (B, T, C): moved to where the model predicts that token
            counts.append(F.pad(targets[:, i:] >= 0, (i, 0)))
        if not guesses:
            return h.new_zeros(())
        guesses = torch.stack(guesses, dim=2).flatten(0, 1) # (B T, n, C)
        counts = torch.stack(counts, dim=2).flatten(0, 1) # (B T, n)
        # A few rows at a time; backward computes their logits again. The head is cast once for all of them.
        weight = model.head.weight.detach()
        dtype = product_dtype(weight)
        weight = pad_vocabulary(weight, dtype) if h.is_cuda else weight.to(dtype)
        rows = max(1, (_AHEAD_LOGITS_CUDA if h.is_cuda else _AHEAD_LOGITS) // (self.depth * len(weight)))
        parts = zip(*(t.split(rows) for t in (h.flatten(0, 1), guesses, counts)))
        sums = [checkpoint(self.loss_of_rows, model, weight, *part, use_reentrant=False) for part in parts]
        return sum(sums) / counts.sum().clamp(min=1)

    @staticmethod
    def loss_of_rows(model, weight, h, guesses, counts): # (V or more, C), (rows, C), (rows, n, C), (rows, n)
        V = model.config.vocab_size
        want = model.cap(widen(F.linear(h.unsqueeze(1), weight)[..., :V])) # (rows, 1, V)
        got = model.cap(widen(F.linear(guesses, weight)[..., :V])) # (rows, n, V)
        return -((want.softmax(-1) * got.log_softmax(-1)).sum(-1) * counts).sum()

    def flops(self, T): # of `depth` cells and heads and the model's head, on a quarter of the tokens
        cell = self.up.flops(T) + self.down.flops(T) # the Linears count one cell themselves
        return (self.depth * (cell + self.head_flops) + self.head_flops) // 4 - cell


class Uncertainty(nn.Module):
    """The score sigmoid(z): the probability that the next token is not the one with the largest logit.

    It judges the model's first guess at temperature 1, whatever token is then drawn. z = log((1 - p) / p) + k
    with the softmax's largest probability p: at first the score is 1 - p, the usual measure. The correction
    k = W_down gelu(W_up h) is learned from the trunk's output h. Both inputs are detached. So far it does not
    beat 1 - p on new text (python bench.py uncertainty), since it learns on text that the trunk has learned.
    """
    place, loss_name, detached = "beside the trunk", "uncertainty", True
    # Weight of the penalty k^2. Without it AUROC on new text is 0.0024 below that of 1 - p; with it, 0.0004.
    PRIOR = 0.1

    def __init__(self, c):
        super().__init__()
        self.head_flops = 2 * c.n_embd * c.vocab_size
        # role="gate", because sparse training and Muon leave gates alone.
        self.up = linear(c, c.n_embd, max(1, c.n_embd // 2), bias=True, role="gate")
        self.down = Linear(self.up.out_features, 1, True, std=0.0, role="gate")

    def forward(self, h, logits): # (..., C), (..., V) -> z (...), k (...)
        log_p = logits.detach().log_softmax(-1).amax(-1).clamp(max=-1e-6) # p = 1 would make z infinite
        k = widen(self.down(activate(self.up(h.detach()), "gelu"))).squeeze(-1)
        return (-log_p.expm1()).log() - log_p + k, k

    def loss(self, model, h, idx, targets, notes):
        """Cross-entropy of "the likeliest token is wrong", in nats, and PRIOR k^2, on 1/4 of the rows."""
        few = len(h) // 4 or len(h)
        h, targets = h[:few], targets[:few]
        with torch.no_grad():
            logits = model.logits(h)
        z, k = self(h, logits)
        known, wrong = (targets >= 0).type_as(z), (logits.argmax(-1) != targets).type_as(z)
        terms = F.binary_cross_entropy_with_logits(z, wrong, reduction="none") + self.PRIOR * k.square()
        return (terms * known).sum() / known.sum().clamp(min=1)

    def flops(self, T): # on a quarter of the tokens, with the forward of the model's head
        own = self.up.flops(T) + self.down.flops(T) # the Linears count one forward themselves
        return (own + self.head_flops // 3) // 4 - own


# the knob that switches it on: the class
EXTRAS = {"thought_tokens": Thoughts, "memory_slots": Memory, "future_peek": Peek, "depths": Router,
          "n_ahead": Ahead, "uncertainty": Uncertainty}


# --- rules: which configs are refused. What concerns one class alone stands in its own complaints(c). -------

SLOTS = {"norm": NORM, "position": POSITION, "attention": ATTENTION, "activation": ACTIVATIONS, "glu": GLU,
         "residual": RESIDUAL, "diff_form": DIFF_FORM, "h_res": H_RES}


def classes(row):
    return row if isinstance(row, tuple) else (row,)


def knobs_of(part):
    return getattr(part, "knobs", ())


# {knob: what it belongs to: (slot, choices) or (extra, [])}. The slots diff_form and h_res are knobs as well:
# they count for some choices of attention and residual.
OWNERS = {knob: (extra, []) for extra, make in EXTRAS.items() for knob in knobs_of(make)}
for _slot, _table in SLOTS.items():
    for _name, _row in _table.items():
        for _knob in itertools.chain(*map(knobs_of, classes(_row))):
            OWNERS.setdefault(_knob, (_slot, []))[1].append(_name)


def missing_owner(c, knob):
    """The entry of OWNERS that c must choose before the knob counts, the outermost first; None: it counts."""
    if knob not in OWNERS:
        return None
    slot, names = OWNERS[knob]
    chosen = getattr(c, slot) in names if names else getattr(c, slot)
    return missing_owner(c, slot) or (None if chosen else OWNERS[knob])


def chosen_by(c):
    """The classes that the config c uses."""
    rows = [table[getattr(c, slot)] for slot, table in SLOTS.items() if not missing_owner(c, slot)]
    extras = [make for knob, make in EXTRAS.items() if getattr(c, knob)]
    return [*itertools.chain(*map(classes, rows)), *extras]


def idle_knobs(c):
    """{knob: its missing owner} for the knobs of c that are set and do not count."""
    owners = {f.name: missing_owner(c, f.name) for f in fields(c) if getattr(c, f.name) != f.default}
    return {knob: owner for knob, owner in owners.items() if owner}


def complaints(c):
    """What is wrong with a config, each sentence with the way out; GPTConfig raises the first."""
    for slot, table in SLOTS.items():
        if getattr(c, slot) not in table:
            known = ", ".join(map(str, table)) + " (swish is silu)" * (getattr(c, slot) == "swish")
            yield f"{slot}={getattr(c, slot)!r} is not known; choose one of: {known}"
            return # what follows looks the choices up
    for knob in ("block_size", "vocab_size", "n_layer", "n_embd", "n_head"):
        if getattr(c, knob) < 1:
            yield f"{knob}={getattr(c, knob)} must be at least 1"
    if type(c.depths) is not tuple or any(type(d) is not int for d in c.depths):
        yield f"depths={c.depths!r} must be whole numbers, as in (2, 4, 8)"
        return
    for f in fields(c):
        if type(f.default) in (int, float) and f.default == 0 and getattr(c, f.name) < 0:
            yield f"{f.name}={getattr(c, f.name)} must not be negative; 0 is the default"
    if not 0 <= c.dropout < 1:
        yield f"dropout={c.dropout} must be in [0, 1)"
    if not c.head_dim and c.n_embd % c.n_head:
        yield f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}; change one of them or set head_dim"
    if c.n_head % c.kv_heads:
        yield f"n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}; choose a divisor"
    if c.zero_init and c.tie_embeddings:
        yield "zero_init with tie_embeddings starts as a model that repeats tokens; set tie_embeddings=False"
    if c.conv and c.depths: # the tokens before one that continues may have stopped
        yield f"conv={c.conv} reads tokens that depths={c.depths} stops; set conv=0 or depths=()"
    for knob, (slot, names) in idle_knobs(c).items(): # silently ignored, it would spoil comparisons
        needs = f"{slot}={' or '.join(names)}" if names else slot
        yield f"{knob}={getattr(c, knob)} needs {needs}; drop it or change that"
    for part in chosen_by(c):
        yield from getattr(part, "complaints", lambda c: ())(c)


def unchecked(chosen: dict) -> GPTConfig:
    c = object.__new__(GPTConfig) # without its checks
    c.__dict__.update({f.name: f.default for f in fields(GPTConfig)} | chosen)
    return c


def without_orphans(chosen: dict, typed: set) -> dict:
    """chosen, {field: value}, without the knobs of a config file whose owner the command line switched off:
    `--attention=mha` after a file with a kv_rank should train, not be refused for a knob that nobody typed.
    typed: the names that the command line gave. What is dropped is printed.
    """
    idle = idle_knobs(unchecked(chosen))
    orphans = [knob for knob, (slot, _) in idle.items() if knob not in typed and slot in typed]
    for knob in orphans:
        print(f"{knob}={chosen[knob]} of the config file is dropped: the command line chose against it")
    return {name: value for name, value in chosen.items() if name not in orphans}


def saved_fields(chosen: dict, path: str) -> dict:
    """chosen, the fields of GPTConfig in a file. ValueError for a name or a type that GPTConfig lacks."""
    usual = {f.name: type(f.default) for f in fields(GPTConfig)}
    also = {float: int, tuple: list} # what JSON makes of them
    strange = sorted(f"{k}={v!r}" for k, v in chosen.items()
                     if k not in usual or type(v) not in (usual[k], also.get(usual[k])))
    if strange:
        raise ValueError(f"{path} has settings that this model.py does not know: {', '.join(strange)[:200]}\n"
                         "for a run of train.py use the commit that its run.json names, or train again")
    return chosen


# --- checkpoints --------------------------------------------------------------------------------------------
# One file, which torch.load reads as it is. torch.load does not notice damaged tensor bytes, so
# the sha256 of all other bytes is kept in the comment field that the zip format has at its very end.

_SEAL = 7 + 64 # b"sha256:" and 64 hex digits


def save_checkpoint(path: str, state: dict, keep_previous: bool = True) -> None:
    """Writes to another name, then renames: whenever the process dies, path is a whole checkpoint. The one
    before becomes *.prev.pt. OSError or RuntimeError if the disk is full: nothing has changed then.
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
    """Appends the sha256 of the file, and forces all of it onto the disk."""
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


def link_checkpoint(path: str, name: str) -> None:
    """Gives the checkpoint at path another name: a hard link, or a copy where the file system has none.

    Whenever the process dies, name is a whole checkpoint, or what it was before.
    """
    if os.path.exists(name) and os.path.samefile(path, name):
        return # renaming one link of a file to another would do nothing
    part = os.path.join(os.path.dirname(name), "link.part") # no save writes to it, and so into the other name
    with suppress(FileNotFoundError):
        os.remove(part)
    try:
        os.link(path, part)
    except OSError:
        shutil.copyfile(path, part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
    os.replace(part, name)


def step_of(path: str) -> float:
    """The step of a checkpoint, read without its tensors. Infinity if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception: # torch.load raises many kinds
        return math.inf


def previous_checkpoint(path: str) -> str:
    return os.path.splitext(path)[0] + ".prev.pt"


def load_checkpoint(path: str) -> dict:
    """What save_checkpoint wrote, on the CPU. FileNotFoundError; ValueError if damaged or not of its kind."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give a file in it: best.pt or ckpt.pt")
    with open(path, "rb") as f:
        blob = f.read()
    if blob[-_SEAL:-64] != b"sha256:":
        raise ValueError(f"{path} is cut short, or was not written by train.py; give its ckpt.pt or best.pt")
    if hashlib.sha256(blob[:-_SEAL]).hexdigest().encode() != blob[-64:]:
        raise ValueError(f"{path} is damaged: its bytes do not match their sha256; use another checkpoint")
    return unpickled(path)


def unpickled(path: str) -> dict:
    """What torch.load reads of a file that holds tensors and numbers alone, on the CPU. Else ValueError."""
    if torch.__version__ < (2, 10): # CVE-2026-24747: weights_only=True let code through
        raise ValueError(f"torch {torch.__version__} may run code of a file: pip install -r requirements.txt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error: # torch.load raises many kinds for a pickle of more than tensors
        problem = str(error).splitlines()[0][:120]
        raise ValueError(f"{path} holds more than weights and numbers, or less: {problem}\n"
                         "it is not what train.py writes and may run code; use another checkpoint") from None


def load_run(path: str) -> tuple[dict, str]:
    """What load_checkpoint reads, and from where. path: a file, or the folder of a run, of which best.pt is
    read, or the newest checkpoint that is whole. Damaged ones are named.
    """
    if not os.path.isdir(path):
        return load_checkpoint(path), path
    kept = sorted(Path(path).glob("step_*.pt"), reverse=True)
    names = [Path(path, name) for name in ("best.pt", "ckpt.pt", "ckpt.prev.pt")] + kept
    if not (names := [str(name) for name in names if name.exists()]):
        raise FileNotFoundError(f"there is no checkpoint in {path}: give the folder of a run, or train first")
    for name in names:
        try:
            return load_checkpoint(name), name
        except ValueError as error:
            print(f"WARNING: {error}", file=sys.stderr)
    raise ValueError(f"no checkpoint in {path} is whole: train again")


# --- weights of other programs ------------------------------------------------------------------------------
# weights_of(model) is {their name: a view of our weights}: export reads the views, import writes into them.
# FAMILIES does the same for config.json.

MAY_CHANGE = ("block_size", "dropout", "gradient_checkpointing", "n_ahead", "uncertainty") # of given weights
# OpenAI's sizes: layers, heads, width, revision of openai-community/NAME on Hugging Face's hub. It could not
# be asked here: what was tried is the way through DATA_MIRROR.
GPT2 = {"gpt2": (12, 12, 768, "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
        "gpt2-medium": (24, 16, 1024, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
        "gpt2-large": (36, 20, 1280, "32b71b12589c2f8d625668d2335a01cac3249519"),
        "gpt2-xl": (48, 25, 1600, "15ea56dee5df4983c59b2538573817e1667135e2")}

# The words of our names that differ in theirs. {q,k,v}: three of theirs lie in one of ours, row below row.
_GPT2_WORDS = {"embed": "wte", "position.table": "wpe", "norm": "ln_f", "head": "lm_head", "blocks": "h",
               "norm1": "ln_1", "attention": "attn", "qkv": "c_attn", "out": "c_proj",
               "norm2": "ln_2", "up": "c_fc", "down": "c_proj"}
_LLAMA_WORDS = {"embed": "embed_tokens", "head": "lm_head", "blocks": "layers",
                "norm1": "input_layernorm", "attention": "self_attn", "qkv": "{q,k,v}_proj", "out": "o_proj",
                "norm2": "post_attention_layernorm", "gate_up": "{gate,up}_proj", "down": "down_proj",
                "maps.vectors": "lambda_{q1,k1,q2,k2}", # DiffLlama's; what follows is DeepSeek-V3's
                "q_down": "q_a_proj", "q_latent_norm": "q_a_layernorm", "q_up": "q_b_proj",
                "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}


def weights_of(model, transposed=True):
    """{their name: a view of our weights, in their order}, without what stands beside the trunk.
    transposed: GPT-2's matrices are (n_in, n_out). False: as nanoGPT stores them.
    """
    c, views, gpt2 = model.config, {}, model.config.position == "learned"
    words = _GPT2_WORDS if gpt2 else _LLAMA_WORDS if c.q_rank else {**_LLAMA_WORDS, "q_up": "q_proj"}
    for name, w in model.named_parameters(): # a tied head is no parameter of its own
        if name.startswith("extras."):
            continue
        their = re.sub(r"position\.table|maps\.vectors|\w+", lambda ours: words.get(ours[0], ours[0]), name)
        module, several = model.get_submodule(name.rpartition(".")[0]), re.search("{(.*)}", their)
        if not several: # embeddings and head are not transposed
            turned = gpt2 and transposed and w.dim() == 2 and module.role == "matrix"
            views[their] = w.T if turned else w
            continue
        parts = w.split(module.fused) if isinstance(module, Linear) else w # DiffV1 has a row for each vector
        for one, part in zip(several[1].split(","), parts):
            if one in ("q", "k"): # we rotate neighbours (2i, 2i+1) of a head, Llama rotates (i, i + D/2)
                part = part.unflatten(0, (-1, c.head_width // 2, 2)).transpose(1, 2) # (heads, 2, D/2, C)
            views[their.replace(several[0], one)] = part
    if gpt2 and transposed and not c.bias: # transformers' GPT-2 has every bias
        inner = [name for name in views if re.match(r"h\.|ln_f", name)]
        views |= {f"{name[:-6]}bias": torch.zeros(views[name].size(-1)) for name in inner}
    return views


def flat(view):
    """A view of weights_of in their shape: (heads, 2, D/2, C) -> (heads D, C); others stay."""
    return view.flatten(0, -2) if view.dim() > 1 else view


_LLAMA = {"vocab_size": "vocab_size", "hidden_size": "n_embd", "intermediate_size": "mlp_hidden",
          "num_hidden_layers": "n_layer", "num_key_value_heads": "n_kv_head", "num_attention_heads": "n_head",
          "head_dim": "head_dim", "rope_theta": "rope_base", "max_position_embeddings": "block_size",
          "rms_norm_eps": "norm_eps", "hidden_act": "activation", "tie_word_embeddings": "tie_embeddings"}
_SWIGLU = {"activation": "silu", "glu": True, "tie_embeddings": False, "block_size": 2048}
_PLAIN = {"rope_type": "default", "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False}
# {model_type: (class in transformers, {their field: ours}, our fields that all of them have or that count
# where theirs are missing, their fields of which we have this value alone)}. Of two fields that are one of
# ours the second counts.
FAMILIES = {
    "llama": ("LlamaForCausalLM", _LLAMA, _SWIGLU, _PLAIN),
    "mistral": ("MistralForCausalLM", _LLAMA, _SWIGLU, {**_PLAIN, "sliding_window": None}),
    "diffllama": ("DiffLlamaForCausalLM", _LLAMA,
                  {**_SWIGLU, "attention": "diff", "diff_form": "v1", "norm_eps": 1e-5}, _PLAIN),
    "deepseek_v3": ("DeepseekV3ForCausalLM",
                    {"first_k_dense_replace": "n_layer", **_LLAMA, "num_key_value_heads": "n_head",
                     "head_dim": "rope_dim", "qk_rope_head_dim": "rope_dim", "v_head_dim": "head_dim",
                     "kv_lora_rank": "kv_rank", "q_lora_rank": "q_rank"},
                    {**_SWIGLU, "attention": "mla"}, {**_PLAIN, "rope_interleave": True}),
    "gpt2": ("GPT2LMHeadModel",
             {"vocab_size": "vocab_size", "n_embd": "n_embd", "n_inner": "mlp_hidden", "n_layer": "n_layer",
              "n_head": "n_head", "n_ctx": "block_size", "n_positions": "block_size",
              "layer_norm_epsilon": "norm_eps", "activation_function": "activation",
              "tie_word_embeddings": "tie_embeddings"},
             {"norm": "layernorm", "position": "learned", "bias": True, "activation": "gelu_tanh"},
             {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False}),
}
_ACTIVATION = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu",
               "silu": "silu", "gelu": "gelu", "relu2": "relu2"} # theirs: ours


def our_fields(found: dict, path: str) -> dict:
    """The fields of GPTConfig for what config.json holds. ValueError names what our architecture lacks."""
    kind, rope = found.get("model_type"), found.get("rope_parameters") or found.get("rope_scaling") or {}
    if str(kind) not in FAMILIES:
        raise ValueError(f"{path}: model_type={kind!r} is none of those we have: {', '.join(FAMILIES)}")
    _, names, ours, needed = FAMILIES[kind]
    rope = rope if isinstance(rope, dict) else {"type": rope}
    found = {**found, "rope_type": rope.get("type", "default"), **rope} # older files have type
    if kind == "deepseek_v3": # our values are as wide as keys
        key_width = found.get("qk_nope_head_dim", 128) + found.get("qk_rope_head_dim", 64)
        needed = {**needed, "v_head_dim": key_width}
    if lacking := [f"{k}={found[k]}" for k, v in needed.items() if found.get(k, v) != v]:
        raise ValueError(f"{path}: our {kind} has no {', '.join(lacking)}")
    chosen = ours | {field: found[name] for name, field in names.items() if found.get(name) is not None}
    act = chosen["activation"]
    return {**chosen, "activation": _ACTIVATION.get(str(act), act)} # GPTConfig refuses others


def spelled_out(c):
    """The fields of c as config.json has them, with usual values in the place of 0. None: it has no such."""
    eps = c.norm_eps or (None if c.attention == "diff" and c.diff_form == "v1" else NORM[c.norm](1).eps)
    theirs = {ours: name for name, ours in _ACTIVATION.items()}
    found = {**vars(c), "n_kv_head": c.kv_heads, "head_dim": c.head_width, "mlp_hidden": c.hidden,
             "activation": theirs.get(c.activation), "norm_eps": eps, "q_rank": c.q_rank or None}
    return found | ({"kv_rank": c.latent_rank, "rope_dim": c.rotary_width} if "mla" in c.attention else {})


def their_config(c, kind):
    """The config.json of c, as far as the family can tell."""
    architecture, names, _, _ = FAMILIES[kind]
    here = spelled_out(c)
    found = {"model_type": kind, "architectures": [architecture], "torch_dtype": "float32",
             **{name: here[field] for name, field in names.items()}}
    if kind != "gpt2": # where transformers 5 looks for rope_theta; older programs read the one above
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_base}
    if kind == "deepseek_v3":
        found |= {"qk_nope_head_dim": c.head_width - here["rope_dim"], "num_nextn_predict_layers": 0}
    return found


def family_of(c):
    """The model_type of c. ValueError names the fields of c that are lost on the way there and back."""
    def lost(kind):
        here, there = spelled_out(c), spelled_out(unchecked(our_fields(their_config(c, kind), "")))
        free = {*MAY_CHANGE, "init_std", "zero_init", "bias" if kind == "gpt2" else ""} # no bias: zeros there
        return sorted(k for k in here.keys() - free if here[k] != there[k])

    kind = min(FAMILIES, key=lambda kind: len(lost(kind)))
    if names := lost(kind):
        hint = "\nDiffLlama has one epsilon: train with --norm_eps=1e-5" * ("norm_eps" in names)
        raise ValueError(f"transformers has no such model: its nearest, {FAMILIES[kind][0]}, lacks "
                         + ", ".join(f"{k}={vars(c)[k]}" for k in names) + hint)
    return kind


@torch.no_grad()
def copy_weights(views, theirs, path):
    """Copies the tensors of another program into weights_of. ValueError if names or shapes differ."""
    # torch.compile puts _orig_mod. in front; files of a trunk alone lack its name
    theirs = {re.sub(r"^(_orig_mod\.)?(transformer\.|model\.)?", "", k): w for k, w in theirs.items()}
    constants = r"\.attn\.(masked_)?bias|inv_freq" + "|^lm_head.weight" * ("lm_head.weight" not in views)
    if strange := sorted(k for k in theirs.keys() ^ views.keys() if not re.search(f"({constants})$", k)):
        raise ValueError(f"{path} has other weights than its settings say: {data.listed(strange, 3)}")
    for name, view in views.items():
        if theirs[name].shape != (shape := flat(view).shape):
            raise ValueError(f"{path}: {name} is {tuple(theirs[name].shape)}, not {tuple(shape)}")
        view.copy_(theirs[name].reshape(view.shape))


def read_json(path):
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    raise ValueError(f"{path} is damaged: it holds no JSON object")


def weights_in(path):
    """{name: tensor} of a file, or of all files of a folder. ValueError: none there, or a damaged one."""
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not (files := [path] if path.is_file() else files):
        raise ValueError(f"{path} has no weights: neither model.safetensors nor pytorch_model.bin")
    found = {}
    for file in files:
        if file.suffix == ".bin":
            found |= unpickled(file)
            continue
        package = data.package("safetensors.torch", "a .safetensors file")
        try:
            found |= package.load_file(file)
        except Exception as error: # the package raises many kinds
            raise ValueError(f"cannot read {file}: {error}") from error
    return found


def tokenizer_of(folder, vocab_size, data_dir):
    """That of tokenizer.json; our gpt2 where it is GPT-2's, or is missing and the vocabulary is GPT-2's."""
    gpt2, path = data.GPT2Tokenizer(None, data_dir), os.path.join(folder, "tokenizer.json")
    if folder in GPT2:
        return gpt2
    if os.path.isfile(path):
        codec = data.make_tokenizer(path, "", data_dir)
        return gpt2 if codec.name == "hf" and codec.is_gpt2() else codec
    known = gpt2.vocab_size <= vocab_size <= 50304 # up to a multiple of 64, as nanoGPT has it
    print(f"{folder} has no tokenizer" + ": by its vocab_size, assumed gpt2" * known)
    return gpt2 if known else None


def export_hf(model: GPT, to: str) -> str:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer of transformers load; returns the class of
    the model. ValueError if transformers has none.
    """
    c, codec, kind = model.config, model.tokenizer, family_of(model.config)
    end = codec.eot if codec else None
    ends = {"bos_token_id": end, "eos_token_id": end} # else their own defaults would end a text
    files = {"config.json": {**their_config(c, kind), **ends}, "generation_config.json": ends}
    if codec:
        words = {} if end is None else dict.fromkeys(("bos_token", "eos_token"), codec.decode([end]))
        files["tokenizer.json"] = json.loads(codec.to_hf())
        files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **words,
                                          "model_max_length": c.block_size}
    trunk = "transformer." if kind == "gpt2" else "model."
    weights = {name if name == "lm_head.weight" else trunk + name: flat(view.detach()).contiguous()
               for name, view in weights_of(model).items()}
    save = data.package("safetensors.torch", "--format=hf").save_file
    os.makedirs(to, exist_ok=True)
    save(weights, os.path.join(to, "model.safetensors"), _WRITTEN)
    for name, value in files.items():
        Path(to, name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return FAMILIES[kind][0]


_WRITTEN = {"format": "pt", "writer": "nanoSLM"} # in model.safetensors; transformers asks for the first


def may_replace(to, form):
    """Whether nothing lies at a path, or an empty folder, or an earlier export of this form."""
    with suppress(Exception): # nothing is there, or what is there cannot be read as one
        if form == "weights":
            return "optimizer" not in load_checkpoint(to)
        file = os.path.join(to, "model.safetensors")
        return not os.listdir(to) or data.package("safetensors").safe_open(file, "pt").metadata() == _WRITTEN
    return not os.path.exists(to)


def export_run(argv):
    """What python model.py export does."""
    words = [arg for arg in argv if not arg.startswith("-")] # the run, wherever it stands
    chosen = {"format": "hf", "to": "", "__file__": __file__}
    configurator.configure(chosen, argv=[arg for arg in argv if arg not in words])
    form, to = chosen["format"], os.path.expanduser(chosen["to"])
    if len(words) != 1 or not to or form not in ("hf", "weights"):
        raise ValueError("usage: python model.py export RUN --format=hf --to=FOLDER\n"
                         "       python model.py export RUN --format=weights --to=FILE.pt")
    state, path = load_run(words[0])
    model = GPT.from_state(state, path)
    if not may_replace(to, form):
        raise ValueError(f"{to} is there and is no earlier export: choose another --to")
    if form == "weights":
        kept = {name: state[name] for name in ("model", "config", "tokenizer", "step")}
        os.makedirs(os.path.dirname(to) or ".", exist_ok=True)
        save_checkpoint(to, kept, keep_previous=False)
        return print(f"{to}: {os.path.getsize(to):,} bytes, for sample.py --out_dir and train.py --init_from")
    made = export_hf(model, to)
    if outside := [knob for knob in ("n_ahead", "uncertainty") if getattr(model.config, knob)]:
        print(f"left out, since transformers has no place for it: {', '.join(outside)}")
    print(f"{to}: AutoModelForCausalLM.from_pretrained({to!r}) is a {made}")


# --- presets ------------------------------------------------------------------------------------------------
# Fields of GPTConfig for eight sizes. A field that is given as well takes precedence; train.py takes
# vocab_size from the data. Parameters are counted with a vocabulary of 50,000, up to a multiple of 64, and
# with the tied embedding once. Heads are 32, then 64, from large on 128 wide.

_SHARED = {"activation": "silu", "glu": True, "block_size": 512, "vocab_size": 50048}
PRESETS = {
    "nano": {"n_layer": 6, "n_head": 5, "n_embd": 160, **_SHARED}, # 10M, of which the embedding is 8M
    "micro": {"n_layer": 7, "n_head": 5, "n_embd": 320, **_SHARED}, # 25M
    "tiny": {"n_layer": 10, "n_head": 12, "n_embd": 768, **_SHARED}, # 109M
    "small": {"n_layer": 12, "n_head": 14, "n_embd": 896, **_SHARED}, # 161M
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, **_SHARED}, # 355M
    "large": {"n_layer": 24, "n_head": 12, "n_embd": 1536, **_SHARED}, # 756M
    "xl": {"n_layer": 28, "n_head": 16, "n_embd": 2048, **_SHARED}, # 1.51B
    "xxl": {"n_layer": 36, "n_head": 20, "n_embd": 2560, **_SHARED}, # 2.97B
}


def preset(name: str) -> dict:
    """The fields of a model size, {} for the empty name. ValueError for an unknown one names the nearest."""
    if name and name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0)
        raise ValueError(f"unknown model_size {name!r}\n"
                         f"Nearest: {', '.join(near)}. There are: {', '.join(PRESETS)}")
    return PRESETS.get(name, {})


# --- python model.py: the learner's door --------------------------------------------------------------------
# Models are built on the meta device: shapes and counts, but no memory.


def describe(config: GPTConfig, T: int, batch_size: int = 1) -> None:
    """Prints the model as one batch flows through it."""
    with torch.device("meta"):
        model = GPT(config)
        idx = torch.zeros(batch_size, T, dtype=torch.long)
    outputs = {} # name: output, in the order of the calls: a part after what it is a part of
    for name, m in model.named_modules():
        m.register_forward_pre_hook(lambda m, x, name=name: outputs.update({name: None}))
        m.register_forward_hook(lambda m, x, out, name=name: outputs.update({name: out}))
    model(idx, targets=idx)
    print(f"{'part':<34}{'class':<13}{'output':<24}{'parameters':>12}{'forward FLOPs/token':>21}")
    print(f"{'tokens':<34}{'':<13}{str(tuple(idx.shape)):<24}")
    for name, out in outputs.items():
        m, (parent, _, inner) = model.get_submodule(name), name.partition(".")
        out = out[0] if type(out) is tuple else out
        number, _, inner = inner.partition(".") if parent == "blocks" else ("", "", "")
        if isinstance(m, (nn.Identity, nn.Dropout)) or not name or number not in ("", "0"):
            continue # the other blocks are like the first
        label = "  " * (inner.count(".") + 1) + inner if inner else name
        label = f"blocks.0 (of {config.n_layer})" if name == "blocks.0" else label
        count, flops = sum(p.numel() for p in m.parameters()), forward_flops(m, T)
        print(f"{label:<34}{type(m).__name__:<13}{str(tuple(out.shape)):<24}{count:>12,}{flops:>21,}")
    shared = " (head and embedding share theirs)" if config.tie_embeddings else ""
    print(f"\n{model.num_params():,} parameters{shared}; "
          f"{model.flops_per_token(T):,} training FLOPs per token at context {T}")
    caches = [model.new_cache(1, dtype) for dtype in (torch.float32, torch.bfloat16, "int8", "int4")]
    fp32, bf16, int8, int4 = (cache.nbytes() // (cache.front + cache.capacity) for cache in caches)
    print(f"cache: {fp32:,} bytes per token in fp32, {bf16:,} in bf16, {int8:,} in int8, {int4:,} in int4")


def show_presets() -> None:
    """Prints the table of sizes. The parameters are those of a built model."""
    print(f"{'--model_size':<14}{'layers':>7}{'heads':>7}{'width':>7}{'context':>9}{'parameters':>15}")
    for name, preset in PRESETS.items():
        c = GPTConfig(**preset)
        with torch.device("meta"):
            count = GPT(c).num_params()
        print(f"{name:<14}{c.n_layer:>7}{c.n_head:>7}{c.n_embd:>7}{c.block_size:>9}{count:>15,}")


model_size = "" # setting of this door and of train.py: a name in PRESETS; empty: the defaults of GPTConfig

if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        with configurator.user_errors():
            export_run(sys.argv[2:])
        sys.exit()
    out_dir = "" # folder of a run, whose model is described; in a config file it has no effect
    given = configurator.configure(globals(), GPTConfig,
                                   guest_of=os.path.join(os.path.dirname(__file__), "train.py"))
    with configurator.user_errors():
        config = GPTConfig(**{**preset(given.pop("model_size", "")), **without_orphans(given, given.typed)})
    if "vocab_size" not in given:
        print(f"(vocab_size={config.vocab_size:,} is the default; train.py takes it from the data: "
              "characters of Shakespeare are 65)\n")
    describe(config, config.block_size)
    if config == GPTConfig():
        print()
        show_presets()
