"""
Every architecture of nanoSLM in one file.

Read GPTConfig first: it lists what can be chosen. Then read Block and GPT.forward: a model is a stack of
blocks, and a block holds one choice of each slot. After that comes one section a slot, then the extras, the
rules, checkpoints and sizes. All choices are made in __init__; no forward reads the config.

  python model.py --attention=diff_mla   prints that model as data flows through it: shapes, parameters, FLOPs

B batch   T new tokens   S tokens attended to, cached and new   C channels (n_embd)   V vocabulary
H heads (n_head)   K key/value heads (n_kv_head)   D head width (head_dim)   R latent rank (kv_rank)
P rotary width (rope_dim)   N residual streams (n_stream)   M memory slots   G tokens of a memory segment

To add a variant: write one small class, add one row to the table of its slot, add its knobs to GPTConfig and
to the class's `knobs`, and add its values to CHOICES in tests/test_model.py. Nothing else changes.
"""
import configurator # first: see stop_at_once there

import copy
import difflib
import hashlib
import itertools
import math
import os
import struct
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import (ACTIVATIONS, activate, few_rows, gated_pair, linear_cross_entropy, mhc_coefficients,
                     mhc_gates, read_streams, rmsnorm, rope_table, rotate, write_streams)


# ------------------------------------------------------------------------------------------------------------
# the configuration


@dataclass
class GPTConfig:
    """
    What a model is. A knob left at 0 takes its usual value, so that a copy with another n_embd follows. See
    complaints().
    """

    block_size: int = 256 # longest context L, in tokens
    vocab_size: int = 50304 # train.py takes it from the data; here GPT-2's 50257, a multiple of 64
    n_layer: int = 6 # number of blocks
    n_embd: int = 384 # channels C
    norm: str = "rmsnorm" # layernorm | rmsnorm
    position: str = "rope" # learned | rope | none
    rope_base: float = 10000.0 # slowest rotary wavelength is about 2 pi rope_base tokens
    attention: str = "mha" # mha | mla | diff | diff_mla
    n_head: int = 6 # heads H; with diff_form=v1 it counts the maps, two of which make one differential head
    n_kv_head: int = 0 # key/value heads of mha and diff: 0 = n_head, 1 = multi-query
    head_dim: int = 0 # width D of a head, rotary part included: 0 = n_embd // n_head
    qk_norm: bool = False # RMSNorm of queries and keys (of a latent: of the shared rotary key)
    kv_rank: int = 0 # latent width R of mla and diff_mla, which is what gets cached: 0 = n_embd // 4
    q_rank: int = 0 # rank of the query projection of mla and diff_mla: 0 = direct
    rope_dim: int = 0 # rotary width P of mla and diff_mla, part of head_dim: 0 = head_dim // 2
    diff_form: str = "v2" # v1: lambda per layer, norm per head | v2: lambda per token, doubled queries
    activation: str = "relu2" # gelu | relu2 | silu | telu | crrelu
    glu: bool = False # gate the MLP: down(act(gate x) * up x)
    mlp_hidden: int = 0 # MLP width: 0 = 4 C; with glu 8/3 C, to a multiple of 32: equal parameters
    residual: str = "plain" # plain | hyper | mhc
    n_stream: int = 0 # residual streams N of hyper and mhc: 0 = 4, as in both papers
    h_res: str = "sinkhorn" # how mhc makes its mixing matrix doubly stochastic: sinkhorn | permutations
    sinkhorn_iters: int = 20 # of h_res=sinkhorn
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
    future_peek: int = 0 # predict the mean of so many tokens to come, for the layers above: 0 = off
    depths: tuple = () # layers after which a token may be done, n_layer last: (2, 4, 8); () = off
    mean_depth: float = 0.0 # layers that a token takes on average: 0 = halfway from first to last
    n_ahead: int = 0 # tokens that a small cell learns to draft, for speculative decoding: 0 = off, 7 is usual
    uncertainty: bool = False # a small head learns how probable it is that the likeliest next token is wrong

    def __post_init__(self):
        if type(self.depths) is list: # JSON makes lists of tuples
            self.depths = tuple(self.depths)
        for sentence in complaints(self):
            raise ValueError(sentence)

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
    def rotary_width(self): # how much of a query or key is rotated: the heads decide, if the position rotates
        heads, _ = ATTENTION[self.attention]
        return heads.rotary_width(self) if POSITION[self.position].rotates else 0

    @property
    def streams(self):
        return self.n_stream or RESIDUAL[self.residual].usual_streams

    @property
    def segment(self):
        return self.memory_segment or max(1, self.block_size // 4)

    @property
    def stage_depths(self): # layers above which the stages of depth routing end; one stage without depths
        return self.depths or (self.n_layer,)

    @property
    def target_depth(self):
        return self.mean_depth or (self.stage_depths[0] + self.n_layer) / 2

    @property
    def middle(self): # memory and future peek lie above this layer: all tokens are there and know each other
        return min(max(1, self.n_layer // 2), self.stage_depths[0])

    @property
    def hidden(self):
        return self.mlp_hidden or (math.ceil(8 * self.n_embd / 3 / 32) * 32 if self.glu else 4 * self.n_embd)


# ------------------------------------------------------------------------------------------------------------
# the model


class Block(nn.Module):
    """
    Pre-norm: attention, then the MLP. Each reads its input from the residual stream and writes its output
    back. With residual=plain, read is h itself and write is h + output; the other choices carry N streams
    (see the section residual).
    """

    def __init__(self, c, layer):
        super().__init__()
        residual, (heads, maps) = RESIDUAL[c.residual], ATTENTION[c.attention]
        self.residual1, self.residual2 = residual(c, 2 * layer), residual(c, 2 * layer + 1)
        self.norm1, self.attention = NORM[c.norm](c.n_embd, c.bias), heads(c, layer, maps(c, layer))
        self.norm2, self.mlp = NORM[c.norm](c.n_embd, c.bias), GLU[c.glu](c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, pass_): # (B, T, C), or (B, T, N, C) with streams -> the same shape
        x, mix = self.residual1.read(h)
        h = self.residual1.write(h, self.dropout(self.attention(self.norm1(x), pass_)), mix)
        x, mix = self.residual2.read(h)
        return self.residual2.write(h, self.dropout(self.mlp(self.norm2(x))), mix)


class CheckpointedBlock(Block):
    """Keeps only its input for backward and computes the rest again."""

    def forward(self, h, pass_):
        if not torch.is_grad_enabled() or pass_.cache is not None: # computing again would fill it again
            return super().forward(h, pass_)
        return checkpoint(super().forward, h, pass_, use_reentrant=False)


class GPT(nn.Module):
    """
    logits, losses = model(idx, targets)

    idx (B, T) int64, T <= block_size; with a memory and no cache any T, split into windows that only memory
    connects. With targets (B, T), where -1 is ignored: logits (B, T, V) and losses {"ce": nats per token}; in
    train mode also the losses of modules that have one of their own. Without targets: logits (B, 1, V) of the
    last token, and {}. With a cache: idx are the tokens that follow those in it, logits (B, T, V). Logits are
    fp32 (fp64 for a model in double). with_logits=False gives None for them and the same losses without ever
    holding them all, which is what training needs.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.block_size, self.n_stream, self.n_thought = c.block_size, c.streams, c.thought_tokens
        on = {knob: make for knob, make in EXTRAS.items() if getattr(c, knob)}
        self.embed = Embedding(c.vocab_size, c.n_embd, outer_std(c))
        self.position = POSITION[c.position](c)
        self.thoughts = Thoughts(c) if c.thought_tokens else nn.Identity()
        self.dropout = nn.Dropout(c.dropout)
        self.streams = RESIDUAL[c.residual]
        make_block = CheckpointedBlock if c.gradient_checkpointing else Block
        self.blocks = nn.ModuleList(make_block(c, layer) for layer in range(c.n_layer))
        between = [knob for knob, make in EXTRAS.items() if make.place == "between two blocks"]
        self.between = nn.ModuleList(
            Between(c, on[knob](c), 2 * c.n_layer + i) for i, knob in enumerate(between) if knob in on)
        self.routers = nn.ModuleList(Router(c, stage) for stage in range(len(c.stage_depths) - 1))
        # Without depths there is one stage, which is all layers. With depths a router decides above each but
        # the last.
        bottom = [*self.blocks[: c.middle], *self.between, *self.blocks[c.middle : c.stage_depths[0]]]
        self.stages = [bottom, *(list(self.blocks[a:b]) for a, b in itertools.pairwise(c.stage_depths))]
        self.norm = NORM[c.norm](c.n_embd, c.bias)
        self.head = Linear(c.n_embd, c.vocab_size, False, outer_std(c), role="head")
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.softcap = c.logit_softcap
        self.cap = partial(softcap, c.logit_softcap) if c.logit_softcap else nn.Identity()
        with own_randomness(): # else their initial values would shift the dropout of the model beside them
            beside = {make.loss_name: make(c) for make in on.values() if make.place == "beside the trunk"}
            self.extras = nn.ModuleDict(beside)

    def forward(self, idx, targets=None, cache=None, with_logits=True):
        if not with_logits and targets is None:
            raise ValueError("with_logits=False leaves nothing to return without targets; give targets")
        notes = {}
        h = self.trunk(idx, cache, notes) # (B, T, C)
        if cache is None and targets is None:
            h = h[:, -1:] # all that sampling needs
        logits = self.logits(h) if with_logits else None # (B, T, V)
        if targets is None:
            return logits, {}
        if with_logits:
            ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        else:
            ce = linear_cross_entropy(h, self.head.weight, targets, self.softcap)
        own = self.modules_with_loss().items() if self.training else () # of no use but to train
        return logits, {"ce": ce, **{name: module.loss(self, h, idx, targets, notes) for name, module in own}}

    def trunk(self, idx, cache=None, notes=None):
        """
        Token ids (B, T) -> what the head maps to logits (B, T, C). notes: a dict for what the modules' own
        losses will need.
        """
        T, windows = idx.size(1) if idx.dim() == 2 else 0, 1
        if not T:
            raise ValueError(f"idx {tuple(idx.shape)} must be (B, T) with at least one token")
        start = 0 if cache is None else cache.length # position of the first token: an int, or (B,)
        longest, room = (T, self.block_size) if cache is None else (cache.longest() + T, cache.capacity)
        if longest > room and cache is None and self.memory is not None:
            idx, windows = self.memory.fold(idx, room)
        elif longest > room:
            raise ValueError(f"{longest} tokens do not fit into block_size={room}; give the last {room}")
        front = self.n_thought if cache is None else 0 # a cache holds the thoughts already
        h, table = self.position(self.embed(idx.unflatten(1, (windows, -1)).flatten(0, 1)), start, front)
        h = self.thoughts(h) if front else h # (B windows, front + T, C)
        h = self.layers(h, Pass(idx, start, front, windows, table, cache, notes))
        if cache is not None:
            cache.length = start + T
        return self.norm(h)[:, :T]

    def layers(self, h, pass_):
        """
        All blocks, with what lies between them. (B windows, front + T, C) -> (B, windows T, C), without the
        places in front.
        """
        h = self.stage(self.streams.expand(self.dropout(h), self.n_stream), pass_)
        return pass_.text(self.streams.reduce(h))

    def stage(self, h, pass_):
        """
        The layers of one stage for all tokens that come to it, then the next stage for those that its router
        lets go on.
        """
        for layer in self.stages[pass_.stage]:
            h = layer(h, pass_)
        if pass_.stage == len(self.routers):
            return h
        return self.routers[pass_.stage](h, pass_, self.stage)

    def logits(self, h):
        return self.cap(widen(self.head(h))) # (..., V)

    def modules_with_loss(self):
        """
        {name: module} of those that declare a loss_name. Several routers share one loss, which any of them
        computes.
        """
        return {m.loss_name: m for m in self.modules() if hasattr(m, "loss_name")}

    @property
    def memory(self):
        return next((b.body for b in self.between if b.body.remembers), None)

    # --- decoding; the loops stand in sample.py ---

    def new_cache(self, batch_size, dtype=None, spare=0):
        """
        A cache for block_size tokens, and `spare` more that will be thrown away again. It holds the thought
        tokens, which depend on no text. dtype: that of the weights if not given, or of autocast where that is
        on.
        """
        weight, memory = self.embed.weight, self.memory
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        layouts = [block.attention.cache_layout for block in self.blocks]
        layouts += [memory.cache_layout] if memory else []
        cache = Cache(layouts, batch_size, self.block_size + spare, dtype, weight.device, self.n_thought,
                      len(self.routers), memory.memory_layout if memory else ())
        if self.n_thought:
            self.fill_thoughts(cache, batch_size)
        return cache

    @torch.no_grad()
    def fill_thoughts(self, cache, batch_size):
        """The thoughts take the places before position 0, as tokens that follow nothing."""
        was_training, cache.length = self.training, -self.n_thought
        self.eval() # dropout would make them other thoughts
        none = torch.zeros(batch_size, 0, dtype=torch.long, device=self.embed.weight.device)
        h, table = self.position(self.embed(none), 0, self.n_thought)
        self.layers(self.thoughts(h), Pass(none, cache.length, self.n_thought, 1, table, cache))
        cache.length = 0
        self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, speculative=False,
                 generator=None, stop=(), use_cache=True, watch=None):
        """
        idx (B, T) -> (B, T + new). temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.
        speculative: draft and judge (sample.Speculation), the same distribution from fewer forwards. A row
        that has written a token of `stop` repeats it; generation ends when every row has. ValueError for
        values out of range.
        """
        import sample # it imports this file

        return sample.generate(self, idx, max_new_tokens, temperature, top_k, top_p, min_p, speculative,
                               generator, stop, use_cache, watch)

    def generate_with_uncertainty(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                                  generator=None, stop=()):
        """
        As generate, which writes the same ids from the same generator -> (ids (B, T + new), scores (B, new)):
        for each new token the score (Uncertainty) of the forward that it was drawn from; 0 where a row only
        repeats its `stop`. ValueError without the head.
        """
        import sample

        return sample.generate_with_uncertainty(self, idx, max_new_tokens, temperature, top_k, top_p, min_p,
                                                generator, stop)

    @torch.no_grad()
    def uncertainty(self, h, logits=None):
        """
        The score (...) in [0, 1] of h (..., C), the trunk's output; logits (..., V) if at hand. ValueError
        without a head.
        """
        if "uncertainty" not in self.extras:
            raise ValueError("this model has no uncertainty head; train one with --uncertainty")
        return self.extras["uncertainty"](h, self.logits(h) if logits is None else logits)[0].sigmoid()

    # --- what it costs, where it comes from ---

    def num_params(self):
        return sum(p.numel() for p in self.parameters()) # a tied head is counted once

    def flops_per_token(self, T=None):
        """
        Floating-point operations of one training step per token at context T: forward, and twice that for
        backward.
        """
        T = T or self.block_size
        blocks = forward_flops(self.blocks, T + self.n_thought)
        saved = int(blocks * self.config.target_depth / self.config.n_layer) if self.config.depths else blocks
        saved = blocks - saved
        return 3 * (forward_flops(self, T + self.n_thought) + blocks * self.n_thought // T - saved)

    @classmethod
    def from_checkpoint(cls, path, device="cpu"):
        """
        The model of a checkpoint that train.py wrote, in eval mode. FileNotFoundError, or ValueError if it
        cannot be used.
        """
        return cls.from_state(load_checkpoint(path), path).to(device).eval()

    @classmethod
    def from_state(cls, state, path):
        """
        The model of what load_checkpoint returned for path. ValueError if another version of this file wrote
        it.
        """
        try:
            chosen, weights = state["config"]["model"], state["model"]
        except (KeyError, TypeError):
            raise ValueError(f"{path} holds no model of train.py; give its ckpt.pt or best.pt") from None
        model = cls(GPTConfig(**saved_fields(chosen, path)))
        model.load(weights, path)
        return model

    def load(self, weights, path):
        """
        load_state_dict, with a ValueError where the weights in path are those of another version of this
        file.
        """
        try:
            self.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            problem = str(error).splitlines()[:2][-1].strip()[:200] # torch's first line says nothing
            raise ValueError(f"{path} is of another version of model.py: {problem}\n"
                             "use the commit that its run.json names, or train again") from None


def forward_flops(module, T):
    return sum(m.flops(T) for m in module.modules() if hasattr(m, "flops"))


def softcap(cap, logits):
    return cap * torch.tanh(logits / cap) # Gemma 2, arXiv:2408.00118


def own_randomness():
    """A context that ends with the random state that it began with."""
    device = torch.get_default_device()
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# ------------------------------------------------------------------------------------------------------------
# what one forward hands down, and what attention keeps of earlier ones


class Pass:
    """
    What belongs to one forward and to nothing else: GPT.trunk makes it, every layer gets it, then it is
    dropped.

    In a window of h (B windows, front + T, C) the thought tokens come first, then the text. notes collects
    what the losses of modules will need. stage counts the routers that these tokens have passed.
    """

    def __init__(self, idx, start=0, front=0, windows=1, table=None, cache=None, notes=None):
        self.idx, self.start = idx, start # (B, windows T); position of the first token, an int or (B,)
        self.front, self.windows, self.table, self.cache = front, windows, table, cache
        self.notes = {} if notes is None else notes
        self.stage = 0
        self.real = None # (B, T'), False for padding among tokens that a router let go on; None: all are real
        self.places = self.mask = None
        if cache is not None:
            self.places, self.end = cache.open(start, front + idx.size(1))
            self.mask = cache.mask(self.places, self.end)

    def rotate(self, x):
        """Queries or keys (B, heads, T, D), rotated to their positions."""
        return x if self.table is None else rotate(x, self.table)

    def remember(self, layer, *new):
        """
        New keys, values or latents (B, heads, T, width) -> those of all S tokens, the cached ones among them.
        """
        return new if self.cache is None else self.cache.append(layer, self.places, self.end, *new)

    def text(self, x):
        """(B windows, front + T, C) -> (B, windows T, C)."""
        return x[:, self.front :].unflatten(0, (len(x) // self.windows, self.windows)).flatten(1, 2)

    def folded(self, x):
        """The way back from text(): (B, windows T, C) -> (B windows, front + T, C), with zeros in front."""
        return F.pad(x.unflatten(1, (self.windows, -1)).flatten(0, 1), (0, 0, self.front, 0))

    def deeper(self, order=None, real=None):
        """
        The Pass of the T' tokens that go on. order (B, T'): their indices among the T, or None if all go on.
        real: see above.
        """
        new = copy.copy(self)
        new.stage, new.real = self.stage + 1, real
        if order is not None and self.table is not None: # each token keeps the rotation of its own position
            B, table = len(order), self.table
            table = table.squeeze(1) if table.dim() == 5 else table.expand(B, *table.shape) # (B, T, P/2, 2)
            rows = torch.arange(B, device=order.device)[:, None]
            new.table = table[rows, order].unsqueeze(1) # (B, 1, T', P/2, 2)
        if self.cache is not None:
            if order is not None:
                new.places = self.cache.table_of(self.places, len(order), self.end).gather(1, order)
            new.mask = self.cache.let_through(new.stage, new.places, self.end, real)
        return new


class Cache:
    """
    What attention keeps of the tokens that it has seen: for each layer the tensors that its cache_layout
    lists, each (B, heads, front + capacity, width). A token at position p lies at place front + p of every
    layer; thoughts lie in front. `length` tokens count: an int, or a tensor (B,) where rows differ. To roll
    back is to set it: what lies beyond is ignored.

    alive (stages - 1, B, front + capacity): whether the token at a place came to that stage of depths.
    If not, nobody sees what lies there in the layers of the stage.
    memory (B, heads, segments + 1, slots, width) or None: what a Memory held when each segment began.
    """

    def __init__(self, layouts, batch_size, capacity, dtype, device, front=0, routers=0, memory=()):
        # Zeros, and not what lay in memory: masked places have weight 0, but 0 times a NaN would be NaN.
        def empty(heads, width):
            return torch.zeros(batch_size, heads, front + capacity, width, dtype=dtype, device=device)

        self.layers = [[empty(heads, width) for heads, width in layout] for layout in layouts]
        self.capacity, self.front, self.length, self.device = capacity, front, 0, device
        self.alive = torch.zeros(routers, batch_size, front + capacity, dtype=torch.bool, device=device)
        self.memory = None
        if memory:
            heads, self.segment, slots, width = memory
            shape = batch_size, heads, capacity // self.segment + 1, slots, width
            self.memory = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def longest(self):
        return int(self.length.max()) if torch.is_tensor(self.length) else self.length

    def rows(self, part):
        """
        A cache of these rows (a slice) that lies in this one, at length 0: what is put into it is here
        afterwards.
        """
        new = copy.copy(self)
        new.layers, new.length = [[store[part] for store in layer] for layer in self.layers], 0
        new.alive, new.memory = self.alive[:, part], None if self.memory is None else self.memory[part]
        return new

    def open(self, start, T):
        """
        Makes room for T tokens from position `start` on -> their places, an int for the first or (B, T), and
        the end of all.
        """
        places, end = self.front + start, self.front + self.longest() + T
        if torch.is_tensor(start):
            places = places[:, None] + torch.arange(T, device=self.device) # (B, T)
        if len(self.alive): # none has come to a later stage yet; drafts that were rolled back may have
            at = self.table_of(places, self.alive.size(1), end)
            self.alive.scatter_(2, at.expand(len(self.alive), -1, -1), False)
        return places, end

    def append(self, layer, places, end, *new):
        """
        Stores new tensors (B, heads, T, width) of a layer at their places -> all of it up to `end`, (B,
        heads, S, width).
        """
        for store, x in zip(self.layers[layer], new):
            if torch.is_tensor(places): # (B, T): each token of each row at a place of its own
                rows = torch.arange(len(x), device=x.device)[:, None]
                store[rows, :, places] = x.transpose(1, 2).to(store.dtype)
            else:
                store[:, :, places : places + x.size(2)] = x
        return [store[:, :, :end].type_as(x) for store, x in zip(self.layers[layer], new)]

    def mask(self, places, end):
        """
        (1 or B, 1, T, S): which places each of T new tokens sees. None where attention needs no mask: one
        token, or all causal.
        """
        if torch.is_tensor(places):
            return torch.arange(end, device=self.device) <= places[:, None, :, None]
        return causal_mask(end - places, end, self.device) if places > 0 and end - places > 1 else None

    def let_through(self, stage, places, end, real):
        """
        Notes that the tokens at these places come to a stage, if real -> (B, 1, T', S): which places they see
        there.
        """
        alive = self.alive[stage - 1]
        at = self.table_of(places, len(alive), end) # (B, T')
        alive.scatter_(1, at, torch.ones_like(at, dtype=torch.bool) if real is None else real)
        mask = alive[:, None, None, :end]
        if at.shape == (1, 1): # decoding one row: all that is alive lies before it
            return mask
        every, at = torch.arange(end, device=self.device), at[:, None, :, None]
        return mask & (every <= at) | (every == at) # padding sees itself: a softmax over nothing would be NaN

    def table_of(self, places, rows, end):
        """Places as a tensor (rows, T)."""
        many = torch.is_tensor(places)
        return places if many else torch.arange(places, end, device=self.device).expand(rows, -1)

    def truncate(self, n):
        """
        Forget all but the first n tokens; n is an int, or a tensor (B,) for rows of their own. ValueError if
        there are not as many.
        """
        n = n.to(self.device) if torch.is_tensor(n) and n.dim() else int(n)
        wanted = torch.as_tensor(n, device=self.device)
        if (wanted < 0).any() or (wanted > self.length).any():
            raise ValueError(f"cannot keep {n} of {self.length} cached tokens")
        self.length = n

    def slide(self, n):
        """Forget all tokens. A memory stays, as it was after the first n."""
        if self.memory is not None:
            self.memory[:, :, 0] = self.memory[:, :, n // self.segment]
        self.length = 0

    def nbytes(self):
        """
        Bytes allocated, as the tensors themselves report them; for its full capacity, whatever the length.
        """
        memory = 0 if self.memory is None else self.memory.nbytes
        return sum(store.nbytes for layer in self.layers for store in layer) + self.alive.nbytes + memory


# ------------------------------------------------------------------------------------------------------------
# parameters: a few leaf classes own every weight. Each gives its initial values, its forward FLOPs per token,
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
        if torch.is_grad_enabled():
            return super().forward(x)
        return few_rows(x, self.weight, self.bias) # leaves many rows to F.linear

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
    """
    For embeddings and head: logits start with a spread of 0.25 whatever the width, within 0.1 nats of the
    uniform loss.
    """
    return c.init_std or 0.25 / math.sqrt(c.n_embd)


def linear(c, n_in, n_out, bias=False, **declared):
    """
    A projection inside a block. At 128 channels a start of 1/sqrt(n_in) reached a loss 0.03 below that of
    half of it.
    """
    return Linear(n_in, n_out, bias, c.init_std or 1 / math.sqrt(n_in), **declared)


def residual_out(c, n_in):
    """
    The projection that adds to the residual stream. 2 n_layer of them add up, hence the smaller start
    (GPT-2).
    """
    std = (c.init_std or 1 / math.sqrt(n_in)) / math.sqrt(2 * c.n_layer)
    return Linear(n_in, c.n_embd, c.bias, std=0.0 if c.zero_init else std)


def widen(x):
    """At least fp32: where half precision would lose what matters. fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------
# norm: (..., width) -> (..., width)


class LayerNorm(nn.Module):
    """y = (x - mean) / std * w (+ b). Ba et al. 2016, arXiv:1607.06450."""

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
    """
    y = x / rms(x) * w, rms(x) = sqrt(mean(x^2) + eps). Zhang & Sennrich 2019, arXiv:1910.07467. It has no
    bias: the argument is there because LayerNorm has it.
    """

    role = "vector"

    def __init__(self, width, bias=False, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rmsnorm(x, self.weight.type_as(x), self.eps)


class HeadNorm(nn.Module):
    """
    RMSNorm of each head, (B, heads, T, D), with one gain for all query heads and one for all key heads.
    arXiv:2010.04245.
    """

    role = "vector"

    def __init__(self, heads, width, eps=1e-6):
        super().__init__()
        self.heads, self.eps = heads, eps # (query heads, key heads)
        self.weight = nn.Parameter(torch.ones(2, width))

    def forward(self, x):
        gain = torch.cat([w.expand(n, 1, -1) for w, n in zip(self.weight, self.heads)]) # (heads, 1, D)
        return rmsnorm(x.contiguous(), eps=self.eps) * gain.type_as(x)


NORM = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


# ------------------------------------------------------------------------------------------------------------
# position: forward(h, start, front) -> (h, table). h (B, T, C) are the token embeddings, start is the
# position of the first token, front counts the thought tokens before the text. They get positions -1, -2, ...
# and so shift no token. `rotates` says whether Pass.rotate turns queries and keys, by the table of cosines
# and sines.


def positions(start, T, device):
    """
    Positions of T tokens: (T,) from the int `start`, or (B, 1, T) from the first position of each row, (B,).
    """
    new = torch.arange(T, device=device)
    return start[:, None, None] + new if torch.is_tensor(start) else start + new


class Learned(nn.Module):
    """A trained vector per position, added to the token embedding. Radford et al. 2019 (GPT-2)."""

    rotates = False

    def __init__(self, c):
        super().__init__()
        self.table = Embedding(c.block_size, c.n_embd, outer_std(c))

    def forward(self, h, start, front=0):
        last = self.table.num_embeddings - 1
        m = positions(start, h.size(1), h.device).clamp(max=last) # a draft past the end is thrown away later
        added = self.table.weight[m] # (T, C) or (B, 1, T, C)
        return h + (added.squeeze(1) if added.dim() == 4 else added), None


class Rope(nn.Module):
    """
    Rotary embedding (Su et al. 2021, arXiv:2104.09864): pair i of a query or key at position m is rotated by
    the angle m base^(-2i/P), so that a score depends on the distance of two positions alone. Pairs are
    neighbours (2i, 2i+1) as in the paper: the rotation is then one complex product, fewer passes over memory
    than with the two halves that Llama pairs. Both are the same up to a permutation of weight rows
    (tests/test_parity.py).
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


# ------------------------------------------------------------------------------------------------------------
# attention: forward(x, pass_) -> (B, T, C). A row of the table answers two questions, one class each:
#   where do queries, keys and values come from?   DenseHeads: straight from x. LatentHeads: through a latent.
#   how do softmax maps become an output head?     OneMap: one map each. DiffV1, DiffV2: two maps' difference.
# All heads have keys and values of the same width D, which fused attention kernels ask for.


def naive_attention(q, k, v):
    """
    What attention computes, by its formula. Vaswani et al. 2017; H > K: Ainslie et al. 2023,
    arXiv:2305.13245.
    """
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v)) # (B, K, S, D) -> (B, H, S, D)
    score = q @ k.mT / math.sqrt(q.size(-1)) # (B, H, T, S)
    T, S = score.shape[-2:]
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T) # queries are the last T of S
    return score.masked_fill(future, -torch.inf).softmax(-1) @ v # (B, H, T, D)


def attend(q, k, v, mask=None, scale=None):
    """
    naive_attention by PyTorch's fused kernels. q (B, H, T, D), k and v (B, K, S, D) with H a multiple of K:
    head h reads key head h // (H/K) -> (B, H, T, D). mask (1 or B, 1, T, S), True where a query sees; None:
    causal. scale: 1/sqrt(D) if None.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None and T == S and T > 1: # training and whole prompts: the kernels' own causal mode
        if H != K and not flash_takes_groups(q): # the unfused path would hold T x T scores: copy keys
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != k.size(1))
    # New tokens after cached ones. PyTorch's is_causal would align the mask at the top left, which is wrong
    # here.
    mask = causal_mask(T, S, q.device) if mask is None and T > 1 else mask
    # The H/K heads that share a key head are stacked as more queries: cached keys are read once and never
    # copied.
    mask = mask if mask is None or H == K else torch.cat([mask] * (H // K), dim=2) # repeat() is slower
    o = F.scaled_dot_product_attention(q.reshape(B, K, H // K * T, D), k, v, attn_mask=mask, scale=scale)
    return o.reshape(B, H, T, D)


def causal_mask(T, S, device):
    """(1, 1, T, S), True where a query sees a key: the T queries are the last of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


def flash_takes_groups(q):
    """
    Whether a fused kernel shares key heads by itself. On CUDA only flash and cuDNN do, in half precision,
    from capability 8 on.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    return not q.is_cuda or half and torch.cuda.get_device_capability(q.device) >= (8, 0)


class OneMap(nn.Module):
    """Ordinary attention: each query head is one softmax map, and makes one output head."""

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
    Differential attention as in the paper, section 2.1: (softmax_1 - lambda softmax_2) V, then RMSNorm per
    head, then (1 - lambda_init). lambda = exp(q1.k1) - exp(q2.k2) + lambda_init, one per layer. Maps h and h
    + H/2 make output head h; its value, twice as wide, is value heads h and h + H/2 side by side. All weights
    keep the shapes of mha with that n_head.
    """

    role = "vector"
    value_halves = 2

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer) # layer counts from 0; the paper's l - 1
        self.vectors = nn.Parameter(0.1 * torch.randn(4, c.head_width)) # q1, k1, q2, k2
        self.eps = 1e-5

    @staticmethod
    def complaints(c):
        if c.n_head % 2 or c.kv_heads % 2:
            yield (f"diff_form=v1 pairs heads: n_head={c.n_head} and n_kv_head={c.kv_heads} must be even; "
                   "or use diff_form=v2")

    def attend(self, q, k, v, mask=None):
        # One call for each half of the value keeps all widths at D: 8 D multiplications per pair of tokens
        # instead of 6 D, and still faster than the unfused path that a value of 2 D would take.
        halves = [attend(q, k, torch.cat([half, half], dim=1), mask) for half in v.chunk(2, dim=1)]
        return torch.cat(halves, dim=-1) # (B, H, T, 2 D)

    def combine(self, o, x): # (B, H, T, E) -> (B, H/2, T, E)
        q1, k1, q2, k2 = widen(self.vectors).unbind()
        lam = (q1 @ k1).exp() - (q2 @ k2).exp() + self.lambda_init
        first, second = widen(o).chunk(2, dim=1) # nearly equal numbers are subtracted in fp32
        return (first - lam * second).type_as(o)

    def finish(self, o):
        return F.rms_norm(o, o.shape[-1:], eps=self.eps) * (1 - self.lambda_init)


class DiffV2(OneMap):
    """
    The second form (microsoft/unilm, January 2026): twice the query heads over unchanged keys and values.
    Queries 2h and 2h+1 share a key head; output head h is their difference with lambda = sigmoid(W x), one
    per token and head. It has no norm.
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


class Difference:
    """Makes the map that diff_form names."""

    slots = {"diff_form": DIFF_FORM}

    def __new__(cls, c, layer):
        return DIFF_FORM[c.diff_form](c, layer)


class DenseHeads(nn.Module):
    """
    Queries, keys and values straight from x. The cache holds K keys and K values of width D per token and
    layer.
    """

    knobs = ("n_kv_head",)

    def __init__(self, c, layer, maps):
        super().__init__()
        self.layer, self.maps = layer, maps
        self.D, self.K, self.Q = c.head_width, c.kv_heads, c.n_head * maps.query_heads # Q query heads
        q, k = self.Q * self.D, self.K * self.D # rows of queries; rows of keys, and of values
        per_head = (self.D,) * (self.Q + self.K) + (1,) * k # queries and keys by head, values by row
        self.qkv = linear(c, c.n_embd, q + 2 * k, c.bias, fused=(q, k, k), blocks=per_head)
        self.norm = HeadNorm((self.Q, self.K), self.D) if c.qk_norm else nn.Identity()
        self.out = residual_out(c, c.n_head * self.D)
        self.cache_layout = ((self.K, self.D), (self.K, self.D)) # heads and width of each cached tensor

    @staticmethod
    def rotary_width(c):
        return c.head_width

    def forward(self, x, pass_):
        heads = self.qkv(x).unflatten(-1, (-1, self.D)).transpose(1, 2) # (B, Q + 2 K, T, D)
        qk, v = heads.split([self.Q + self.K, self.K], dim=1)
        qk = pass_.rotate(self.norm(qk)) # queries and keys at once: half as many small operations
        q, k = qk.split([self.Q, self.K], dim=1) # (B, Q, T, D), (B, K, T, D)
        k, v = pass_.remember(self.layer, k, v) # (B, K, S, D); a cached key keeps its rotation
        o = self.maps.attend(q, k, v, pass_.mask) # (B, maps, T, E)
        o = self.maps.combine(o, x).transpose(1, 2) # (B, T, output heads, E)
        return self.out(self.maps.finish(o).flatten(2)) # (B, T, C)

    def flops(self, T): # scores and mix over the whole context, not its causal half: the usual way to count
        return 2 * T * self.Q * self.D * (1 + self.maps.value_halves)


class LatentHeads(nn.Module):
    """
    Multi-head latent attention (DeepSeek-V2 2024, arXiv:2405.04434, section 2.1). x is projected to a latent
    c (R numbers, normed) and one rotary key r (P numbers) for all heads; only these R + P numbers are cached.
    Per head: key [W_uk c, r], value W_uv c, query [q_n, q_r]. The unrotated width is D - P.

    Two ways lead to the same result, and the one with fewer multiplications is taken:
      expanded   makes keys and values of all S tokens, then attends as usual: training and long prompts;
      absorbed   scores q_n (W_uk c) as (q_n W_uk) c, mixes latents, and lifts only the mixture by W_uv:
                 decoding. The maps of a differential head are subtracted as latents, so that each output head
                 is lifted once.
    The softmax scale is 1/sqrt(D) in both. No norm may stand between W_uk and the score: it could not be
    absorbed.
    """

    knobs = ("kv_rank", "q_rank", "rope_dim")

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
        # per head: U rows of W_uk, then D rows of W_uv
        blocks = ((self.U,) + (1,) * self.D) * self.H
        self.kv_up = linear(c, self.R, self.H * (self.U + self.D), blocks=blocks)
        norms = (RMSNorm(w) if c.qk_norm and w else nn.Identity() for w in (self.D, self.P))
        self.norm_q, self.norm_r = norms
        self.out = residual_out(c, self.H * self.D)
        self.cache_layout = ((1, self.R + self.P),)

    @staticmethod
    def rotary_width(c):
        return c.rope_dim or c.head_width // 2

    @staticmethod
    def complaints(c):
        if c.rope_dim and not c.rotary_width:
            yield f"rope_dim={c.rope_dim} needs position=rope; drop it or change that"
        if c.rotary_width > c.head_width - 2:
            yield (f"rope_dim={c.rotary_width} must leave at least 2 of head_dim={c.head_width} unrotated; "
                   "lower rope_dim")
        if c.latent_rank < 1:
            yield (f"n_embd={c.n_embd} leaves no latent of n_embd // 4 for attention={c.attention}; "
                   "set kv_rank, or raise n_embd")
        if c.latent_rank % 2 or c.head_width % 2: # rotary pairs lie after them
            yield (f"kv_rank={c.latent_rank} and head_dim={c.head_width} must be even with "
                   f"attention={c.attention}; change them")

    def forward(self, x, pass_):
        q = self.q_up(self.q_latent_norm(self.q_down(x))).unflatten(-1, (self.Q, self.D)) # (B, T, Q, D)
        q_n, q_r = self.norm_q(q).transpose(1, 2).split([self.U, self.P], dim=-1) # (B, Q, T, U), (B, Q, T, P)
        c, r = self.kv_down(x).unsqueeze(1).split([self.R, self.P], dim=-1) # (B, 1, T, R), (B, 1, T, P)
        q_r, r = pass_.rotate(q_r), pass_.rotate(self.norm_r(r))
        (latent,) = pass_.remember(self.layer, torch.cat([self.kv_norm(c), r], dim=-1)) # (B, 1, S, R + P)
        attend_ = self.absorbed if self.absorbing_pays(x.size(1), latent.size(2)) else self.expanded
        o = attend_(q_n, q_r, latent, x, pass_.mask) # (B, T, output heads, E)
        return self.out(self.maps.finish(o).flatten(2)) # (B, T, C)

    def absorbing_pays(self, T, S):
        """
        Counts the multiplications of both forms for T new tokens among S. A whole sequence (T = S) is
        flash's.
        """
        expanded = S * self.R * self.H * (self.U + self.D) + T * S * self.Q * 2 * self.D
        absorbed = T * self.R * (self.Q * self.U + self.H * self.D) + T * S * self.Q * 2 * (self.R + self.P)
        return (T == 1 or T < S) and absorbed < expanded

    def expanded(self, q_n, q_r, latent, x, mask):
        c, r = latent.split([self.R, self.P], dim=-1)
        kv = self.kv_up(c.squeeze(1)).unflatten(-1, (self.H, -1)).transpose(1, 2) # (B, H, S, U + D)
        k_n, v = kv.split([self.U, self.D], dim=-1)
        k = torch.cat([k_n, r.expand(-1, self.H, -1, -1)], dim=-1) # (B, H, S, D): all heads share r
        o = self.maps.attend(torch.cat([q_n, q_r], dim=-1), k, v, mask)
        return self.maps.combine(o, x).transpose(1, 2)

    def absorbed(self, q_n, q_r, latent, x, mask):
        w = self.kv_up.weight.unflatten(0, (self.H, -1)) # (H, U + D, R)
        w_uk, w_uv = w.split([self.U, self.D], dim=1)
        q_n = q_n.unflatten(1, (self.H, -1)) # (B, H, maps of a head, T, U)
        q_c = torch.einsum("bhjtu,hur->bhjtr", q_n, w_uk).flatten(1, 2) # (B, Q, T, R)
        # One key head serves all queries. Its values are the keys too, and the last P columns of the mixture
        # are dropped: all widths are equal then, and the cache is used as it lies.
        o = attend(torch.cat([q_c, q_r], dim=-1), latent, latent, mask, scale=self.D**-0.5) # (B, Q, T, R + P)
        o = self.maps.combine(o[..., : self.R], x) # (B, output heads, T, R)
        w_uv = w_uv.unflatten(0, (self.maps.value_halves, -1)) # value halves first: heads h and h + H/2
        return torch.einsum("bhtr,ghdr->bthgd", o, w_uv).flatten(3)

    def flops(self, T):
        return 2 * T * self.Q * self.D * (1 + self.maps.value_halves)


ATTENTION = {
    "mha": (DenseHeads, OneMap),
    "mla": (LatentHeads, OneMap),
    "diff": (DenseHeads, Difference),
    "diff_mla": (LatentHeads, Difference), # the two together; both halves are the papers'
}


# ------------------------------------------------------------------------------------------------------------
# activation and MLP: (B, T, C) -> (B, T, C)


class Activation(nn.Module):
    """
    A name of kernels.ACTIVATIONS, which has the formulas. crrelu learns one epsilon per layer from 0.01, as
    its paper.
    """

    role = "vector"

    def __init__(self, c):
        super().__init__()
        self.name = c.activation
        self.eps = nn.Parameter(torch.tensor([0.01])) if c.activation == "crrelu" else None

    def forward(self, x):
        return activate(x, self.name, self.eps if self.eps is None else self.eps[0])

    def pair(self, x):
        """act(gate) * up, of gate and up side by side: (..., 2 F) -> (..., F)."""
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
    """
    down(act(gate x) * up x): SwiGLU with silu, GEGLU with gelu. Shazeer 2020, arXiv:2002.05202. gate and up
    are one matrix, gate's rows first.
    """

    def __init__(self, c):
        super().__init__()
        self.gate_up = linear(c, c.n_embd, 2 * c.hidden, c.bias, fused=(c.hidden, c.hidden))
        self.activation = Activation(c)
        self.down = residual_out(c, c.hidden)

    def forward(self, x):
        return self.down(self.activation.pair(self.gate_up(x)))


GLU = {False: MLP, True: GatedMLP}


# ------------------------------------------------------------------------------------------------------------
# residual: what carries h from sublayer to sublayer. read(h) gives a sublayer its input, and `mix`, which
# write will need. Plain carries h (B, T, C); the others N streams (B, T, N, C), mixed anew around each
# sublayer. At the start all streams are equal, which makes the model the plain one. Each sublayer then mostly
# reads one of them, in turn, and writes to all: were all read alike, their gradients would be equal and the
# streams would stay copies for ever.


def naive_streams(x, f, pre, post, res):
    """
    One token's streams x (N, C) around the sublayer f (C,) -> (C,), with coefficients pre (N,), post (N,),
    res (N, N).
    """
    y = f(sum(pre[i] * x[i] for i in range(len(x))))
    return torch.stack([sum(res[o, i] * x[i] for i in range(len(x))) + post[o] * y for o in range(len(x))])


class Plain(nn.Module):
    """h + f(h). He et al. 2015, arXiv:1512.03385."""

    usual_streams = 1

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
    naive_streams for all tokens at once: X (B, T, N, C) -> X' = H_res X + H_post y, where the sublayer reads
    H_pre X. A class below makes these coefficients of each token from X, in fp32: pre (B, T, N), post (B, T,
    N), res (B, T, N, N) [out, in].
    """

    role, usual_streams, knobs = "vector", 4, ("n_stream",)

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
        with without_autocast(h): # it would round the product of matrices to half precision
            return write_streams(h, y, *mix)

    def flops(self, T):
        return 2 * self.N * (self.N + 1) * self.C # H_pre X and H_res X


def without_autocast(x):
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type) # the meta device has none
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


class Hyper(Streams):
    """
    Hyper-connections (Zhu et al. 2024, arXiv:2409.19606, section 2.2): static coefficients, and for each
    stream a part tanh(norm(X) W) s of the token's own.
    """

    def __init__(self, c, sublayer):
        super().__init__()
        self.N, self.C = N, C = c.streams, c.n_embd
        self.norm = NORM[c.norm](C)
        self.dynamic = Linear(C, N + 2, False, std=0.0, role="gate") # to pre, to post, to the N outputs
        self.pre, self.post = nn.Parameter(torch.eye(N)[sublayer % N]), nn.Parameter(torch.ones(N))
        self.res = nn.Parameter(torch.eye(N))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def coefficients(self, h):
        # h is fp32 also where the weights are bf16
        dynamic = F.linear(self.norm(h), self.dynamic.weight.type_as(h)).tanh() # (B, T, N, 2 + N)
        pre, post, res = dynamic.split([1, 1, h.size(2)], dim=-1) # res [in, out]
        s = self.scale
        pre, post = self.pre + s[0] * pre.squeeze(-1), self.post + s[1] * post.squeeze(-1)
        return pre, post, self.res + s[2] * res.mT

    def flops(self, T):
        return super().flops(T) + (self.N - 1) * self.dynamic.flops(T) # one stream is counted with the Linear


class BySinkhorn(nn.Module):
    """
    Doubly stochastic (..., N, N) of N^2 logits: rows exactly, columns as far as the iterations get. Starts
    near I.
    """

    knobs = ("sinkhorn_iters",)

    def __init__(self, c):
        super().__init__()
        self.iters, self.start = c.sinkhorn_iters, 3.0 * torch.eye(c.streams).flatten()

    @staticmethod
    def complaints(c):
        if c.sinkhorn_iters < 1:
            yield f"sinkhorn_iters={c.sinkhorn_iters} must be at least 1; 20 is usual"

    def forward(self, h, phi, alpha, b): # -> pre, post (B, T, N), res (B, T, N, N)
        return mhc_coefficients(h, phi, alpha, b, self.iters)


class ByPermutations(nn.Module):
    """
    Doubly stochastic without iterations, and exact: the mean of all N! permutation matrices under softmax
    weights. arXiv:2601.05732.
    """

    def __init__(self, c):
        super().__init__()
        orders = torch.tensor(list(itertools.permutations(range(c.streams)))) # (N!, N), the identity first
        self.register_buffer("matrices", torch.eye(c.streams)[orders], persistent=False) # (N!, N, N)
        self.start = torch.zeros(len(orders))
        self.start[0] = 3.0 + math.log(len(orders) / c.streams) # as near to I as BySinkhorn

    @staticmethod
    def complaints(c):
        if c.streams > 4:
            yield (f"h_res=permutations has {c.streams}! terms with n_stream={c.streams}; use at most 4, "
                   "or h_res=sinkhorn")

    def forward(self, h, phi, alpha, b):
        pre, post, z = mhc_gates(h, phi, alpha, b) # (B, T, N), (B, T, N), (B, T, N!)
        res = z.softmax(-1) @ self.matrices.flatten(1).type_as(z) # (B, T, N^2)
        return pre, post, res.unflatten(-1, self.matrices.shape[1:])

    def flops(self, T):
        return 2 * self.matrices.numel()


H_RES = {"sinkhorn": BySinkhorn, "permutations": ByPermutations}


class Manifold(Streams):
    """
    Manifold-constrained hyper-connections (Xie et al. 2025, arXiv:2512.24880, section 4): H_pre = sigmoid,
    H_post = 2 sigmoid and H_res doubly stochastic, each of alpha * (norm(flat X) Phi) + b, where alpha scales
    the token's own part alone. Through any number of layers H_res neither grows nor shrinks what it mixes.
    """

    slots = {"h_res": H_RES}

    def __init__(self, c, sublayer):
        super().__init__()
        self.N, self.C = N, C = c.streams, c.n_embd
        self.mixing = H_RES[c.h_res](c)
        self.widths = [N, N, len(self.mixing.start)]
        self.phi = Linear(N * C, sum(self.widths), False, std=0.0, role="gate")
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        # The streams are equal at first, so the shares that are read add up to 1: one stream 0.7, the others
        # the rest.
        read = torch.full((N,), 0.3 / max(1, N - 1)).index_fill(0, torch.tensor(sublayer % N), 0.7)
        self.b = nn.Parameter(torch.cat([read.logit(), torch.zeros(N), self.mixing.start]))

    def coefficients(self, h):
        return self.mixing(h, self.phi.weight, self.alpha, self.b)


RESIDUAL = {"plain": Plain, "hyper": Hyper, "mhc": Manifold}


# ------------------------------------------------------------------------------------------------------------
# extras: parts around and inside the trunk. Each declares
#   place      where GPT puts it: in front of the text | between two blocks | above a stage | beside the trunk
#   loss_name  if it has a loss of its own: loss(model, h, idx, targets, notes), given beside ce in train mode
#   detached   if it learns from detached numbers: optim.py and train.py keep its parameters apart


class Thoughts(nn.Module):
    """
    K learned vectors in front of the text: every token attends to them, they attend to each other, none is
    ever predicted. Registers (Darcet et al. 2023, arXiv:2309.16588), for text. They depend on no token, so
    they leak nothing.
    """

    place = "in front of the text"
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
        self.residual, self.norm = RESIDUAL[c.residual](c, sublayer), NORM[c.norm](c.n_embd, c.bias)
        self.body = body
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, pass_):
        x, mix = self.residual.read(h)
        return self.residual.write(h, self.dropout(self.body(self.norm(x), pass_)), mix)


def naive_memory(slots, keep, keys, values, held):
    """
    One segment: what M slots hold after it. slots (M, D), keep (M,), keys and values (G, D), held (M, 2 D)
    before it.
    """
    score = slots @ keys.T / math.sqrt(keys.size(1)) # (M, G)
    w = torch.cat([keep[:, None], score], dim=1).softmax(1) # (M, 1 + G)
    return w[:, :1] * held + w[:, 1:] @ torch.cat([keys, values], dim=1) # (M, 2 D)


class Memory(nn.Module):
    """
    Attention to the text beyond the window, through M slots. At the end of each segment of G tokens, slot m
    with its learned query s_m attends to them and to what it holds:

        w = softmax([keep_m, s_m k_1, ..., s_m k_G])        slot m = w_0 slot m + sum_i w_i [k_i, v_i]

    Tokens of later segments attend to the slots, as to M more tokens, and to `nothing`, whose value is 0: its
    weight is the gate. Keys and values are normalised when they are attended to, so that slots filled with a
    small w count equally. The memory of a text is a function of that text alone: nothing is stored on the
    module. document_token empties it. In the line of the Recurrent Memory Transformer (Bulatov et al. 2022,
    arXiv:2207.06881), whose slots pass all layers.
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
        # Both starts decide whether recall is learned (bench.py memory). Sharp queries: a slot takes few
        # tokens and not the mean of all. And some slots keep nearly nothing from segment to segment, others
        # nearly all.
        self.slots = nn.Parameter(3 * torch.randn(self.H, self.M, self.D))
        self.keep = nn.Parameter(math.log(self.G) + torch.linspace(-1, 4, self.M).repeat(self.H, 1))
        self.nothing = nn.Parameter(torch.zeros(self.H, 1, self.D))
        self.out = residual_out(c, width)
        self.cache_layout = ((self.H, self.D), (self.H, self.D), (1, 1)) # keys, values, where documents begin
        self.memory_layout = (self.H, self.G, self.M, 2 * self.D)

    @staticmethod
    def complaints(c):
        if (c.block_size // 2) % c.segment:
            yield (f"memory_segment={c.segment} must divide half of block_size={c.block_size}: "
                   "the window moves by halves; change one of them")
        if not -1 <= c.document_token < c.vocab_size:
            yield f"document_token={c.document_token} must be below vocab_size={c.vocab_size}; -1 is none"

    @staticmethod
    def fold(idx, L):
        """A text (B, T) longer than the window -> (B, n L) and n: n windows that only the memory connects."""
        n = math.ceil(idx.size(1) / L)
        return F.pad(idx, (0, n * L - idx.size(1))), n # tokens that come last change nothing

    def forward(self, x, pass_):
        if not pass_.idx.size(1): # thoughts alone, which have no memory
            return torch.zeros_like(x)
        qkv = self.qkv(pass_.text(x)).unflatten(-1, (-1, self.D)).transpose(1, 2) # (B, 3 H, T, D)
        q, k, v = qkv.chunk(3, dim=1)
        begins = (pass_.idx == self.document)[:, None, :, None].type_as(k) # (B, 1, T, 1)
        if pass_.cache is not None: # all S tokens of the window, without the places of the thoughts
            stores = pass_.cache.append(self.layer, pass_.places, pass_.end, k, v, begins)
            k, v, begins = (store[:, :, pass_.cache.front :] for store in stores)
        begins = begins[:, 0, :, 0] # (B, S)
        first, held = self.fill(k, v, begins, pass_)
        return pass_.folded(self.out(self.recall(q, held, first, begins, pass_)))

    def fill(self, k, v, begins, pass_):
        """
        Runs through the segments that end among these tokens -> the number of the first segment with a new
        token, and what the memory holds when each segment from there on begins, (B, H, n + 1, M, 2 D) if n of
        them end here.
        """
        G, start, cache = self.G, pass_.start, pass_.cache
        first, end = (int(start.min()) if torch.is_tensor(start) else start) // G, k.size(2) // G
        if cache is None:
            states = [k.new_zeros(len(k), self.H, self.M, 2 * self.D, dtype=widen(k[:0]).dtype)]
        else:
            states = [cache.memory[:, :, first]]
        if end > first:
            kv = torch.cat([k, v], dim=-1)[:, :, first * G : end * G]
            kv = kv.unflatten(2, (-1, G)) # (B, H, n, G, 2 D)
            score = torch.einsum("hmd,bhngd->bhnmg", self.slots.type_as(k), kv[..., : self.D])
            score = widen(score / math.sqrt(self.D)) # (B, H, n, M, G)
            begins = begins[:, None, first * G : end * G].unflatten(2, (-1, 1, G)) # (B, 1, n, 1, G)
            after = begins.flip(-1).cumsum(-1).flip(-1) - begins # documents that begin after a token
            keep = self.keep[:, None, :, None].expand(*score.shape[:-1], 1)
            keep = keep.masked_fill(begins.sum(-1, keepdim=True) > 0, -torch.inf)
            score = score.masked_fill(after > 0, -torch.inf) # only the segment's last document is kept
            w = torch.cat([keep, score], dim=-1).softmax(-1) # (B, H, n, M, 1 + G)
            new = w[..., 1:] @ widen(kv) # (B, H, n, M, 2 D)
            for n in range(end - first):
                states.append(w[:, :, n, :, :1] * states[-1] + new[:, :, n])
        held = torch.stack(states, dim=2)
        if cache is not None:
            cache.memory[:, :, first : end + 1] = held
        return first, held

    def recall(self, q, held, first, begins, pass_):
        """
        Each token attends to what the memory held when its segment began, if no document has begun since. ->
        (B, T, H D).
        """
        (B, H, T, _), n = q.shape, held.size(2)
        at = positions(pass_.start, T, q.device).reshape(-1, T) # (1 or B, T)
        counts = begins.cumsum(1, dtype=torch.long) # documents begun; bf16 would count to 256 only
        counts = F.pad(counts, (1, 0)).expand(B, -1)
        here = counts.gather(1, (at + 1).expand(B, T)) # up to each token
        before = counts.gather(1, (at // self.G * self.G).expand(B, T)) # before its segment
        # Slots of all segments lie side by side, and each token sees those of its own: (1 or B, T, n M)
        mask = (at // self.G - first)[..., None] == torch.arange(n, device=q.device).repeat_interleave(self.M)
        mask = F.pad(mask & (here == before)[..., None], (1, 0), value=True)[:, None] # (B, 1, T, 1 + n M)
        k, v = rmsnorm(held.flatten(2, 3).unflatten(-1, (2, self.D))).type_as(q).unbind(3) # (B, H, n M, D)
        k = torch.cat([self.nothing.type_as(q).expand(B, -1, -1, -1), k], dim=2)
        o = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 0, 1, 0)), attn_mask=mask) # (B, H, T, D)
        return o.transpose(1, 2).flatten(2)

    def flops(self, T): # as if each token attended to M slots, and each slot to each token
        return 4 * self.H * self.D * self.M + 2 * self.H * self.D * 3 * self.M


class Peek(nn.Module):
    """
    A hint about the next n tokens, predicted from the past: an MLP predicts their mean embedding, each of
    unit size. Its own loss compares that with what really came, to which no gradient flows. The layers above
    get the prediction, gated. LEPTON's idea, but for the future being predicted and not looked at.
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
        """
        Squared error over the mean square of what was to be predicted: 1 for a prediction of 0, 0 for a
        perfect one.
        """
        real = (targets >= 0).unsqueeze(-1) # (B, T, 1)
        table = F.rms_norm(widen(model.embed.weight.detach()), (h.size(-1),)) # (V, C)
        e = table[targets.clamp(min=0)] * real # (B, T, C)
        both = F.pad(torch.cat([e, real.type_as(e)], dim=-1), (0, 0, 0, self.n - 1)) # the last column counts
        sums = both.unfold(1, self.n, 1).sum(-1) # (B, T, C + 1)
        count = sums[..., -1:]
        mean = sums[..., :-1] / count.clamp(min=1)
        off = (widen(notes["peek"])[:, : idx.size(1)] - mean) * (count > 0)
        return off.square().sum() / mean.square().sum().clamp(min=1e-6)


class Router(nn.Module):
    """
    Lets each token decide, from its own state alone, whether it is done or goes on to the next stage of
    layers: by one rule, score > 0, in training and in decoding. Tokens that go on are gathered, so what the
    others skip is not computed. They keep their positions and attend to each other only. What a stage adds is
    multiplied by p = sigmoid(score), through which the score hears of the loss. The mean depth is held by a
    loss of its own, through the same sigmoid (straight-through). In the line of Mixture-of-Depths (Raposo et
    al. 2024, arXiv:2404.02258), whose top-k over the sequence is not causal.
    """

    place, loss_name, knobs = "above a stage", "depth", ("mean_depth",)

    def __init__(self, c, stage):
        super().__init__()
        self.reduce, (here, beyond) = RESIDUAL[c.residual].reduce, c.stage_depths[stage : stage + 2]
        self.layers, self.first, self.target = beyond - here, c.stage_depths[0], c.target_depth
        self.norm, self.gate = NORM[c.norm](c.n_embd, c.bias), linear(c, c.n_embd, 1, True, role="gate")

    @staticmethod
    def complaints(c):
        if sorted({*c.depths, c.n_layer}) != list(c.depths) or c.depths[0] < 1 or len(c.depths) < 2:
            yield (f"depths={c.depths} must rise from at least 1 to n_layer={c.n_layer} in two numbers or "
                   "more, as (2, 4, 8) does to n_layer=8")
        elif not c.depths[0] <= c.target_depth <= c.n_layer:
            yield (f"mean_depth={c.mean_depth} must lie between {c.depths[0]} and {c.n_layer}, "
                   "the first and the last of depths")

    def forward(self, h, pass_, stage):
        """
        h (B, T, ...) below the stage -> h above all stages. stage(h, pass_) runs the tokens that go on
        through the rest.
        """
        x, T = self.reduce(h), h.size(1)
        score = self.score(x) # (B, T)
        go = score > 0 if pass_.real is None else (score > 0) & pass_.real
        if pass_.cache is None:
            depth = pass_.notes.get("depth", self.first) # mean layers of a token up to here
            pass_.notes["depth"] = depth + self.layers * self.share(x, go, pass_)
        if pass_.front:
            go = go | (torch.arange(T, device=go.device) < pass_.front) # thoughts come to all stages
        counts = [T] * len(go) if go.is_meta else go.sum(1).tolist() # on the host: shapes depend on them
        most = max(counts, default=0)
        if most == 0:
            return h
        p = score.sigmoid()
        if most == T and len(go) == 1: # the usual case of decoding one row: nothing to gather
            return torch.lerp(h, stage(h, pass_.deeper()), per_token(p, h))
        order = go.sort(dim=1, descending=True, stable=True).indices # those that go on, then the others
        order = order[:, :most] # (B, T')
        rows = torch.arange(len(go), device=go.device)[:, None]
        real = go[rows, order] # False where a row has fewer than T'
        few = h[rows, order] # (B, T', ...)
        deep = stage(few, pass_.deeper(order, real))
        return h.index_put((rows, order), torch.lerp(few, deep, per_token(p[rows, order] * real, h)))

    def score(self, x):
        return widen(self.gate(self.norm(x))).squeeze(-1)

    def share(self, x, go, pass_):
        """
        Share of the text's tokens that go on. Its gradient is that of the sigmoid, and moves the router
        alone.
        """
        soft = self.score(x.detach()).sigmoid() if torch.is_grad_enabled() else go.float()
        share = go + soft - soft.detach()
        share = share if pass_.real is None else share * pass_.real
        return share[:, pass_.front :].sum() / pass_.idx.numel()

    def loss(self, model, h, idx, targets, notes):
        """Squared distance of the mean depth from the one asked for, in layers."""
        return (notes["depth"] - self.target).square()


def per_token(p, h):
    """(B, T) -> (B, T, 1, ...), in the dtype of h."""
    return p.view(*p.shape, *[1] * (h.dim() - 2)).type_as(h)


_AHEAD_LOGITS = 2**22 # most logits of Ahead.loss held at once: 16 MB a copy, about six copies alive


class Ahead(nn.Module):
    """
    Drafts the tokens after the next from h_t (C), the trunk's output, and the tokens drafted so far: s_0 =
    h_t, and with each further token s_i = s_(i-1) + W_down relu2(W_up [norm s_(i-1), norm e(x_(t+i))]), from
    which the model's own head predicts x_(t+i+1). One cell serves all i. A chain of heads, each fed with what
    the one before drafted, hits 0.75 of the model's probability four tokens on; independent heads (Medusa,
    arXiv:2401.10774) hit 0.3. It is trained half as deep as it drafts: trained 4 and 6 deep, as many of 8
    drafts are kept. Only the cell is trained: trunk, embedding and head are detached. In the line of Hydra
    (Ankner et al. 2024, arXiv:2402.05109). The norms need no gains, since W_up follows.
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
        times = F.linear if torch.is_grad_enabled() else few_rows # module calls would be 8 of a draft's 50 us
        both = rmsnorm(torch.stack([s, e], dim=-2)).flatten(-2) # (..., 2 C)
        return s + times(F.relu(times(both, self.up.weight)).square(), self.down.weight)

    def loss(self, model, h, idx, targets, notes):
        """
        Mean cross-entropy, in nats, against the model's own distribution, by which drafts will be judged: of
        8 drafts 2.3 are kept, and 1.9 of a cell that learns the text's tokens (frozen trunk, one seed). It
        takes a quarter of the rows: a step then takes 1.18 times as long as without the cell.
        """
        few = max(1, len(h) // 4)
        h, idx, targets = h[:few].detach(), idx[:few], targets[:few]
        s, guesses, counts = h, [], []
        for i in range(1, min(self.depth, idx.size(1) - 1) + 1):
            s = self(s[:, :-1], F.embedding(idx[:, i:], model.embed.weight.detach())) # (B, T - i, C)
            guesses.append(F.pad(s, (0, 0, i, 0))) # to where the model itself predicts that token
            counts.append(F.pad(targets[:, i:] >= 0, (i, 0)))
        if not guesses:
            return h.new_zeros(())
        guesses = torch.stack(guesses, dim=2).flatten(0, 1) # (B T, n, C)
        counts = torch.stack(counts, dim=2).flatten(0, 1) # (B T, n)
        # So many rows at a time; backward makes their logits again.
        rows = max(1, _AHEAD_LOGITS // (self.depth * model.config.vocab_size))
        parts = zip(*(t.split(rows) for t in (h.flatten(0, 1), guesses, counts)))
        sums = [checkpoint(self.loss_of_rows, model, *part, use_reentrant=False) for part in parts]
        return sum(sums) / counts.sum().clamp(min=1)

    @staticmethod
    def loss_of_rows(model, h, guesses, counts): # (rows, C), (rows, n, C), (rows, n) -> ()
        weight = model.head.weight.detach()
        want = model.cap(widen(F.linear(h.unsqueeze(1), weight))) # (rows, 1, V)
        got = model.cap(widen(F.linear(guesses, weight))) # (rows, n, V)
        return -((want.softmax(-1) * got.log_softmax(-1)).sum(-1) * counts).sum()

    def flops(self, T):
        # `depth` cells and heads and the model's head, on a quarter of the tokens. Linears count one cell.
        cell = self.up.flops(T) + self.down.flops(T)
        return (self.depth * (cell + self.head_flops) + self.head_flops) // 4 - cell


class Uncertainty(nn.Module):
    """
    The score sigmoid(z): the probability that the token with the largest logit is not the one that follows,
    of text like that trained on. It judges the model's first guess at temperature 1, whatever token is then
    drawn. z = log((1 - p) / p) + k with the softmax's largest probability p: at first the score is 1 - p, the
    usual measure, and it learns the correction k = W_down gelu(W_up h) from the trunk's output h. Both inputs
    are detached. So far it does not beat 1 - p on new text (python bench.py uncertainty): it learns on text
    that the trunk has learned too.
    """

    place, loss_name, detached = "beside the trunk", "uncertainty", True
    PRIOR = 0.1 # weight of the penalty k^2: AUROC on new text is 0.0024 below 1 - p's without it, 0.0004 with

    def __init__(self, c):
        super().__init__()
        self.head_flops = 2 * c.n_embd * c.vocab_size
        # Gates, because sparse training and Muon leave those alone.
        self.up = linear(c, c.n_embd, max(1, c.n_embd // 2), bias=True, role="gate")
        self.down = Linear(self.up.out_features, 1, True, std=0.0, role="gate")

    def forward(self, h, logits): # (..., C), (..., V) -> z (...), k (...)
        log_p = logits.detach().log_softmax(-1).amax(-1).clamp(max=-1e-6) # p = 1 would stay sure for ever
        k = widen(self.down(activate(self.up(h.detach()), "gelu"))).squeeze(-1)
        return (-log_p.expm1()).log() - log_p + k, k

    def loss(self, model, h, idx, targets, notes):
        """
        Mean, over a quarter of the rows, of the cross-entropy of "the likeliest token is wrong", in nats, and
        PRIOR k^2.
        """
        few = len(h) // 4 or len(h)
        h, targets = h[:few], targets[:few]
        with torch.no_grad():
            logits = model.logits(h)
        z, k = self(h, logits)
        known, wrong = (targets >= 0).type_as(z), (logits.argmax(-1) != targets).type_as(z)
        terms = F.binary_cross_entropy_with_logits(z, wrong, reduction="none") + self.PRIOR * k.square()
        return (terms * known).sum() / known.sum().clamp(min=1)

    def flops(self, T): # on a quarter of the tokens, with the model's head. Linears count one forward.
        own = self.up.flops(T) + self.down.flops(T)
        return (own + self.head_flops // 3) // 4 - own


EXTRAS = { # the knob that switches it on: the class
    "thought_tokens": Thoughts,
    "memory_slots": Memory,
    "future_peek": Peek,
    "depths": Router,
    "n_ahead": Ahead,
    "uncertainty": Uncertainty,
}


# ------------------------------------------------------------------------------------------------------------
# rules: which configs are refused. What only one class knows stands in its own complaints(c).

SLOTS = {"norm": NORM, "position": POSITION, "attention": ATTENTION, "activation": ACTIVATIONS, "glu": GLU,
         "residual": RESIDUAL}


def classes(row):
    return row if isinstance(row, tuple) else (row,)


def all_slots():
    """{slot: table} of SLOTS and of the slots inside their classes, as h_res is inside mhc."""
    parts = [part for table in SLOTS.values() for row in table.values() for part in classes(row)]
    return SLOTS | {slot: table for part in parts for slot, table in getattr(part, "slots", {}).items()}


def chosen_by(c):
    """The classes that the config c puts to use."""
    found, tables = [], list(SLOTS.items())
    for slot, table in tables: # grows while it is walked through
        for part in classes(table[getattr(c, slot)]):
            found.append(part)
            tables += getattr(part, "slots", {}).items()
    return found + [make for knob, make in EXTRAS.items() if getattr(c, knob)]


def knobs_of(part):
    return {*getattr(part, "knobs", ()), *getattr(part, "slots", ())}


def owners(knob, used):
    """
    What must be chosen for a knob to count: [(slot or extra, its choices)]. The slot may lie inside another
    choice that is not made; then that one counts. Empty for a knob that always counts. used: the knobs that
    count as things are.
    """
    found = [(extra, []) for extra, make in EXTRAS.items() if knob in knobs_of(make)]
    for slot, table in all_slots().items():
        names = [name for name, row in table.items() if any(knob in knobs_of(part) for part in classes(row))]
        if names and slot not in SLOTS and slot not in used:
            return owners(slot, used)
        found += [(slot, names)] if names else []
    return found


def idle_knobs(c):
    """Knobs of c that differ from their default but belong to no class in use: {knob: owners(knob)}."""
    used = set().union(*map(knobs_of, chosen_by(c)))
    changed = [f.name for f in fields(c) if getattr(c, f.name) != f.default and f.name not in used]
    return {knob: found for knob in changed if (found := owners(knob, used))}


def complaints(c):
    """What is wrong with a config, each sentence with the way out; GPTConfig raises the first."""
    for slot, table in all_slots().items():
        if getattr(c, slot) not in table:
            yield f"{slot}={getattr(c, slot)!r} is not known; choose one of: {', '.join(map(str, table))}"
            return # the rest takes the slots for granted
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
    for knob, found in idle_knobs(c).items(): # it would be ignored, which poisons comparisons
        needs = " or ".join(f"{slot}={' or '.join(names)}" if names else slot for slot, names in found)
        yield f"{knob}={getattr(c, knob)} needs {needs}; drop it or change that"
    for part in chosen_by(c):
        yield from getattr(part, "complaints", lambda c: ())(c)


def without_orphans(chosen, typed):
    """
    chosen, the fields of a config {name: value}, without the knobs that a config file gave and that no longer
    count because a name in `typed`, which the command line gave, switched their owner. It says what it drops:
    `--attention=mha` after a file with a kv_rank should train, and not be refused for a knob that nobody
    typed.
    """
    c = object.__new__(GPTConfig) # not checked yet
    c.__dict__.update({f.name: f.default for f in fields(GPTConfig)} | chosen)
    if any(getattr(c, slot) not in table for slot, table in all_slots().items()):
        return chosen # GPTConfig will refuse it
    idle = {knob: {slot for slot, _ in found} for knob, found in idle_knobs(c).items()}
    orphans = [knob for knob, slots in idle.items() if knob not in typed and typed & slots]
    for knob in orphans:
        print(f"{knob}={chosen[knob]} of the config file is dropped: the command line chose against it")
    return {name: value for name, value in chosen.items() if name not in orphans}


def saved_fields(chosen, path):
    """
    chosen, the fields of GPTConfig that path holds, as keyword arguments. ValueError for a name or a type
    that GPTConfig lacks.
    """
    usual = {f.name: f.default for f in fields(GPTConfig)}
    also = {float: (float, int), tuple: (tuple, list)} # JSON writes 1.0 as 1.0, a tuple as a list
    strange = sorted(k for k, v in chosen.items()
                     if k not in usual or type(v) not in also.get(type(usual[k]), (type(usual[k]),)))
    if strange:
        raise ValueError(f"{path} has settings that this model.py does not know: {', '.join(strange)}\n"
                         "use the commit that its run.json names, or train again")
    return chosen


# ------------------------------------------------------------------------------------------------------------
# checkpoints: one file, which torch.load reads as it stands. torch.load does not notice damaged tensor bytes,
# so the sha256 of all other bytes is kept in the comment field that the zip format has at its very end.

_SEAL = 7 + 64 # b"sha256:" and 64 hex digits


def save_checkpoint(path, state, keep_previous=True):
    """
    Write all, then rename: whenever the process dies, a whole checkpoint is there. The one before becomes
    *.prev.pt. OSError or RuntimeError if it cannot be written (a full disk); what was there before is then
    untouched.
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
    """
    What save_checkpoint wrote, on the CPU. FileNotFoundError; ValueError if the file is damaged or somebody
    else's.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give a file in it: best.pt or ckpt.pt")
    with open(path, "rb") as f:
        blob = f.read()
    if blob[-_SEAL:-64] != b"sha256:":
        raise ValueError(f"{path} is cut short, or was not written by train.py; give its ckpt.pt or best.pt")
    if hashlib.sha256(blob[:-_SEAL]).hexdigest().encode() != blob[-64:]:
        raise ValueError(f"{path} is damaged: its bytes do not match their sha256; use another checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error: # torch.load raises many kinds for a pickle of other things than tensors
        problem = str(error).splitlines()[0][:120]
        raise ValueError(f"{path} holds more than weights and numbers, or less: {problem}\n"
                         "it is not what train.py writes and may run code; use another checkpoint") from None


# ------------------------------------------------------------------------------------------------------------
# presets: fields of GPTConfig for eight sizes. Any field given besides takes precedence; train.py takes
# vocab_size from the data.

# Parameters are counted with a vocabulary of 50,000, to a multiple of 64, and the tied embedding once. Heads
# are 32, then 64, from large on 128 wide.
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


def preset(name):
    """The fields of a model size, {} for the empty name. ValueError for an unknown one names the nearest."""
    if name and name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0)
        raise ValueError(f"unknown model_size {name!r}\n"
                         f"Nearest: {', '.join(near)}. There are: {', '.join(PRESETS)}")
    return PRESETS.get(name, {})


# ------------------------------------------------------------------------------------------------------------
# python model.py: the learner's door


def describe(config, T, batch_size=1):
    """
    Prints the model as one batch flows through it. Built on the meta device: shapes and counts, no numbers,
    no memory.
    """
    with torch.device("meta"):
        model = GPT(config)
        idx = torch.zeros(batch_size, T, dtype=torch.long)
    rows = {} # name -> [module, its output], parents before their parts

    def entered(module, inputs, name):
        rows.setdefault(name, [module, None])

    def left(module, inputs, output, name):
        rows[name][1] = output[0] if type(output) is tuple else output

    for name, m in model.named_modules():
        m.register_forward_pre_hook(partial(entered, name=name))
        m.register_forward_hook(partial(left, name=name))
    model(idx, targets=idx)
    print(f"{'part':<34}{'class':<13}{'output':<24}{'parameters':>12}{'forward FLOPs/token':>21}")
    print(f"{'tokens':<34}{'':<13}{str(tuple(idx.shape)):<24}")
    for name, (m, out) in rows.items():
        parent, _, inner = name.partition(".")
        number, _, inner = inner.partition(".") if parent == "blocks" else ("", "", "")
        if type(m) in (nn.Identity, nn.Dropout) or not name or number not in ("", "0"):
            continue # the other blocks are like the first
        label = "  " * (inner.count(".") + 1) + inner if inner else name
        label = f"blocks.0 (of {config.n_layer})" if name == "blocks.0" else label
        count, flops = sum(p.numel() for p in m.parameters()), forward_flops(m, T)
        print(f"{label:<34}{type(m).__name__:<13}{str(tuple(out.shape)):<24}{count:>12,}{flops:>21,}")
    shared = " (head and embedding share theirs)" if config.tie_embeddings else ""
    print(f"\n{model.num_params():,} parameters{shared}; "
          f"{model.flops_per_token(T):,} training FLOPs per token at context {T}")
    caches = [model.new_cache(1, kind) for kind in (torch.float32, torch.bfloat16)]
    fp32, bf16 = (cache.nbytes() // (cache.front + cache.capacity) for cache in caches)
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
    _train = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    given = configure(globals(), GPTConfig, guest_of=_train)
    with user_errors():
        config = GPTConfig(**{**preset(given.pop("model_size", "")), **without_orphans(given, given.typed)})
    if "vocab_size" not in given:
        print(f"(vocab_size={config.vocab_size:,} is the default; train.py takes it from the data: "
              "characters of Shakespeare are 65)\n")
    describe(config, config.block_size)
    if config == GPTConfig():
        print()
        show_presets()
