r"""All decoding of nanoSLM, and the command line that writes text from a checkpoint of train.py.

From Python, use GPT.generate of model.py, or stream and Speculation below, which give tokens as they come.
Read distribution and stream first. Text and Decoder write the tokens of stream as well: Text for prompts of
different lengths and for conversations, Decoder on a GPU. Speculative decoding rests on naive_judge.

  python sample.py --out_dir=out/shakespeare_diffmla --start="ROMEO:"
  python sample.py --num_samples=4 --temperature=0.8 --top_p=0.95     the newest run below out
  python sample.py --speculative       the same distribution from fewer forwards
  python sample.py --uncertainty       how unsure the model was of each token; train with --uncertainty
  python sample.py --interactive       a conversation, whose text stays in the cache; /help, exit
  python sample.py --json --start=LINES:prompts.txt --stop="\n\n"     many prompts, for a program

B rows written at once   T tokens of the prompt   V vocabulary   C channels   n drafts of a step
"""
from configurator import UserError, checked, configure, from_text, user_errors # first: see stop_at_once there

import glob
import io
import math
import os
import re
import select
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache, partial
from json import dumps # json is a setting here

import torch
import torch.nn.functional as F

from kernels import choose_device, few_rows, widen
from model import GPT, load_run

out_dir = "" # folder of the run, or one of its .pt files; empty: the newest below out
# The prompt. FILE:a.txt: the text of a file. LINES:a.txt: each line that is not blank is a prompt, all are
# drawn as one batch. -: standard input, without its last line end; also read if no start is given and
# something is piped in. With --interactive start is the first line.
start = "\n"
num_samples = 1 # continuations of each prompt, drawn as one batch
max_new_tokens = 500 # length of each
temperature = 0.8 # below 1 sharper, above 1 wilder, 0 always the likeliest token
top_k = 0 # keep only the k likeliest tokens; 0 = all
top_p = 1.0 # keep the likeliest tokens that hold this share of the probability
min_p = 0.0 # keep tokens of at least this share of the likeliest one's probability
stop = "" # strings that end a text, which they are no part of, as in "\n\n||USER:"; \n and \t are understood
seed = 1337 # of the draws: the same seed writes the same text
speculative = False # draft several tokens, judge them in one forward: the same distribution, faster
draft = "auto" # what drafts with --speculative: ahead (the n_ahead cell) | ngram (the text so far) | auto
# Shows with each token the probability that the likeliest one was wrong there. On a terminal it is the
# background: none below 0.2, then at 0.2, 0.4, 0.6 and 0.8 a step from pale yellow to red. Elsewhere, and
# where NO_COLOR is set, each token has a line: 0.12  'a'
uncertainty = False
interactive = False # a prompt a line, each behind all that was said and written; /help says more
# A line with a JSON object for each continuation, and nothing else: prompt, text, tokens (also of the stop),
# finish_reason (stop, length, interrupted), seconds_to_first_token, tokens_per_second. A token has id, text,
# model_logprob (its log-probability at temperature 1, in nats) and, of a model with the head, uncertainty.
json = False
# graph: steps of fixed shape, on CUDA a graph each (class Decoder)   compiled: fused by torch.compile as well
# eager: kernel by kernel, as are prompts of different lengths         auto: graph on CUDA, else eager
decode = "auto" # how plain decoding runs: auto | eager | graph | compiled
cache_dtype = "auto" # of keys and values or latents: auto (as the weights) | int8 | int4: less exact, smaller
device = "auto" # auto (cuda, else mps, else cpu) | cpu | cuda | mps


# --- sampling: what a token is drawn from -------------------------------------------------------------------


def check_sampling(shortest, temperature, top_k, top_p, min_p, max_new_tokens=0):
    """ValueError, with the way out, for values that mean nothing. shortest: tokens of the shortest prompt."""
    for bad, sentence in [
        (max_new_tokens < 0, f"max_new_tokens={max_new_tokens} must not be negative"),
        (not temperature >= 0, f"temperature={temperature} must not be negative; 0 is greedy"),
        (0 < temperature < 1e-6, f"temperature={temperature} is too small to divide by; 0 is greedy"),
        (top_k < 0, f"top_k={top_k} must not be negative; 0 keeps every token"),
        (not 0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]; 1 keeps every token"),
        (not 0 <= min_p < 1, f"min_p={min_p} must be in [0, 1); 0 keeps every token"),
        (shortest == 0, "the prompt is empty; give at least one token"),
    ]:
        if bad:
            raise ValueError(sentence)


def distribution(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0) -> torch.Tensor:
    """logits (..., V) -> the probabilities (..., V) that a token is drawn from.
    temperature first, then the top_k likeliest, then the smallest set that holds top_p of the rest (Holtzman
    et al. 2019, arXiv:1904.09751), then those of at least min_p times the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082).
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = p.cumsum(-1) - p >= top_p # likelier tokens already hold top_p; never true for the first
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    p = logits.softmax(-1)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


NOT_FINITE = "the model's probabilities are not finite: its weights are damaged, or half precision overflows"


# --- plain decoding -----------------------------------------------------------------------------------------


def window_start(n: int, block_size: int) -> int:
    """Position of the first of n tokens that the model sees. Past block_size the window moves by halves, so
    that its context is computed again once in block_size / 2 tokens. Decoding with a cache, without one and
    with speculation share this rule, and so write one text.
    """
    half = max(1, block_size // 2)
    return 0 if n <= block_size else math.ceil((n - block_size) / half) * half # up, so that the rest fits


def move_window(model, cache, idx, old, new):
    """Moves the window from token `old` of idx (B, T) to token `new`, by halves, and empties the cache. A
    memory is carried on as the first half of each window left it. What the cache has not seen of that half,
    as in a long prompt, is computed for the memory alone.
    """
    half = max(1, model.block_size // 2)
    for begin in range(old, new, half):
        if model.memory is not None and cache.length < half:
            model.trunk(idx[:, begin + cache.length : begin + half], cache)
        cache.slide(half)


@torch.no_grad()
def stream(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 1.0, min_p: float = 0.0, generator: torch.Generator | None = None,
           use_cache: bool = True, watch: Callable | None = None, graph: bool = False,
           compile: bool = False) -> Iterator[torch.Tensor]:
    """Yields max_new_tokens tensors (B, 1), each drawn given all tokens before it. idx (B, T): the prompt.
    watch(h (B, 1, C), logits (B, 1, V)), if given, sees what each token is drawn from.
    graph: a Decoder writes, with a cache, many times as fast on CUDA, and yields on the CPU. Where it cannot
    it prints why, and the ordinary path writes, as it does for a watch. compile: see Decoder.
    """
    check_sampling(idx.size(1), temperature, top_k, top_p, min_p, max_new_tokens)
    if graph and not watch and Decoder.takes(model):
        decoder = Decoder(model, len(idx), temperature, top_k, top_p, min_p, generator, compile)
        yield from decoder.stream(idx, max_new_tokens)
        return
    L, cache, start = model.block_size, model.new_cache(idx.size(0)) if use_cache else None, 0
    with evaluating(model):
        for _ in range(max_new_tokens):
            old, start = start, window_start(idx.size(1), L)
            if not use_cache and model.memory is not None: # the memory of all earlier windows, computed anew
                cache, old = model.new_cache(idx.size(0)), 0
            if cache is not None:
                move_window(model, cache, idx, old, start)
            seen = cache.length if cache is not None else 0 # tokens of the window that need no computing
            h = model.trunk(idx[:, start + seen :], cache)[:, -1:] # (B, 1, C)
            logits = model.logits(h) # (B, 1, V), of the last token alone even for a whole prompt
            if watch:
                watch(h, logits)
            p = distribution(logits[:, -1], temperature, top_k, top_p, min_p)
            token = torch.multinomial(p, 1, generator=generator) # (B, 1)
            idx = torch.cat([idx, token], dim=1)
            yield token


@contextmanager
def evaluating(model):
    was_training = model.training
    if was_training: # eval() and train() walk through all modules, so only where they must
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def still_cached(cache, old: list[int], new: list[int], drafts: int) -> int:
    """How many tokens of `new` a cache that has read `old` can keep. The newest is read again: the next token
    is drawn from its output.
    """
    shared = len(os.path.commonprefix([old, new[:-1]])) # it takes lists as well as paths
    # Short convolutions keep the last tokens alone. Rejected drafts took the place of some of them.
    return shared if len(old) - shared <= cache.ring + 1 - cache.taps - drafts else 0


class Text:
    """What a model writes in B rows, which may differ in length, and the cache of it: the tokens of stream.
    step() is a forward for all rows; where rows have more to read than their newest token, one for each of
    these rows. The cache stays from text to text: what two texts share is not read again.
    """
    n = 0 # most drafts of a step

    def __init__(self, model: GPT, idx: torch.Tensor | list[list[int]], temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                 generator: torch.Generator | None = None):
        self.model, self.generator, self.device = model, generator, model.embed.weight.device
        self.sampling = temperature, top_k, top_p, min_p
        # Drafts are a rectangle (B, n). A row with less room is padded, and padding needs places as well.
        self.cache = model.new_cache(len(idx), spare=self.n)
        # Of each row: where its window begins, and how many tokens were read. The cache has those of the
        # window.
        self.starts, self.read = [0] * len(idx), [0] * len(idx)
        self.seen = None # (B, n+1, C) the trunk's output that each token of the latest step was drawn from
        self.rows = [[] for _ in idx]
        self.go_on(idx.tolist() if torch.is_tensor(idx) else idx)

    def go_on(self, rows: list[list[int]]) -> None:
        """Makes these rows of ids the text."""
        check_sampling(min(map(len, rows), default=1), *self.sampling)
        for b, (old, row) in enumerate(zip(self.rows, rows)):
            known = still_cached(self.cache, old[: self.read[b]], row, self.n)
            self.read[b] = known if known > self.starts[b] else 0 # else the window does not hold it
        self.rows = [list(row) for row in rows]
        self.h = None # (B, C) the trunk's output at the last token in the cache; None before the first step
        self.forwards = self.tokens = 0 # of all rows

    def steps(self, rows: list[list[int]], count: int = 0) -> Iterator[list[list[int]]]:
        """As Decoder.steps, but of rows of any lengths, and without end."""
        self.go_on(rows)
        return iter(self.step, None)

    @torch.no_grad()
    def step(self) -> list[list[int]]:
        """One forward -> the tokens that each row wrote: none where only other rows had more to read."""
        starts = [window_start(len(row), self.model.block_size) for row in self.rows]
        behind = [b for b, row in enumerate(self.rows)
                  if self.h is None or self.read[b] < len(row) - 1 or self.starts[b] != starts[b]]
        read, self.read = self.read, [0] * len(starts) # if Ctrl-C ends this step, the cache may hold anything
        with evaluating(self.model):
            wrote = self.refill(behind, read, starts) if behind else self.write()
        for row, tokens in zip(self.rows, wrote):
            row.extend(tokens)
        self.starts, self.read = starts, [len(row) - 1 for row in self.rows]
        self.forwards, self.tokens = self.forwards + 1, self.tokens + sum(map(len, wrote))
        return wrote

    def refill(self, behind, read, starts):
        """Reads what the rows `behind` have not read of their windows; each of them writes one token."""
        wrote = [[] for _ in self.rows]
        # Rows of one length, as at first, share a forward; rows at their own paces have one each.
        together = len(behind) == len(wrote) and len({*zip(map(len, self.rows), self.starts, read)}) == 1
        for part in [slice(0, len(wrote))] if together else [slice(b, b + 1) for b in behind]:
            known, start, cache = read[part][0], starts[part][0], self.cache.rows(part)
            old = self.starts[part][0] if known else 0
            if not known and cache.memory is not None:
                cache.memory[:, :, 0] = 0
            cache.length = known - old
            ids = self.tensor([row[old:] for row in self.rows[part]]) # (rows, T)
            move_window(self.model, cache, ids, 0, start - old)
            h = self.model.trunk(ids[:, start - old + cache.length :], cache)[:, -1] # (rows, C)
            self.h = h.new_zeros(len(wrote), h.size(1)) if self.h is None else self.h.clone()
            self.h[part] = h
            wrote[part] = self.draw(self.distribution(h)).tolist()
        self.seen = self.h[:, None]
        return wrote

    def write(self):
        """Reads the newest token of each row, and draws the next one."""
        self.seen = self.trunk(self.tensor([row[-1:] for row in self.rows])) # (B, 1, C)
        self.h = self.seen[:, 0]
        return self.draw(self.distribution(self.h)).tolist()

    def trunk(self, ids):
        """The output (B, T, C) for the newest token of each row and what is drafted behind it: ids (B, T)."""
        lengths = [len(row) - 1 - start for row, start in zip(self.rows, self.starts)]
        # This also rolls rejected drafts back.
        self.cache.length = lengths[0] if len(set(lengths)) == 1 else self.tensor(lengths)
        return self.model.trunk(ids, self.cache)

    def distribution(self, h):
        """What the model draws from after h (..., C). ValueError if not finite."""
        p = distribution(self.model.logits(h), *self.sampling)
        if not math.isfinite(p.sum()): # the sum is nan if any of its terms is
            raise ValueError(NOT_FINITE)
        return p

    def draw(self, p):
        """A token (B, 1) of each p (B, V), which need not sum to 1. Never a token with p = 0."""
        return torch.multinomial(p, 1, generator=self.generator)

    def tensor(self, ids):
        return torch.tensor(ids, dtype=torch.long, device=self.device)


def capture(run: Callable, carried: Iterable[torch.Tensor] = ()) -> "torch.cuda.CUDAGraph":
    """run() as a CUDA graph. Calls before it let Triton compile and cuBLAS allocate; they leave `carried`."""
    side, graph, before = torch.cuda.Stream(), torch.cuda.CUDAGraph(), [t.clone() for t in carried]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
            for tensor, value in zip(carried, before):
                tensor.copy_(value)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run()
    return graph


class Decoder:
    """Plain decoding in steps of fixed shape, which never wait for the host: the tokens of stream.

    A step reads the token at `position`, a number on the device, and writes the next one behind it. On CUDA
    it is captured once as a graph, and one call then launches all its kernels. Launched one by one they take
    the host 20 to 40 us each, 46 ms for a token of a 124M model. Elsewhere the step runs as it is.
    Attention reads S places and masks those behind the position. S is a power of two, or all places there
    are, and grows with the text: each S has its own graph.
    compile: torch.compile fuses the step's kernels before the capture, which takes up to minutes for each S.
    The cache stays from text to text: what a text shares with the one before it is not read again.
    """
    AHEAD = 16 # steps launched before their tokens are read; after a stop token the others are in vain
    SHORTEST = 128 # the smallest S
    OPTIONS = {"coordinate_descent_tuning": True} # products with one row become kernels fused with the others

    def __init__(self, model: GPT, rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0, generator: torch.Generator | None = None, compile: bool = False):
        self.model, self.cache, self.generator = model, model.new_cache(rows), generator
        self.sampling, weight = (temperature, top_k, top_p, min_p), model.embed.weight
        zeros = partial(torch.zeros, dtype=torch.long, device=weight.device)
        self.position, self.ids = zeros(()), zeros(rows, model.block_size + 1) # the window, a token beyond it
        self.h = weight.new_zeros(*self.ids.shape, weight.size(1)) # what each of ids was drawn from
        self.seen, self.known = None, 0 # h (B, 1, C) of the token just yielded; tokens that the cache holds
        self.noise = widen(weight.new_ones(rows, model.config.vocab_size))
        self.random = [self.noise.exponential_] if temperature else [] # drawn anew before each step
        options = self.OPTIONS if weight.is_cuda else None
        self.fused = partial(torch.compile, dynamic=False, options=options) if compile else lambda step: step
        self.run, self.captures, self.graphs = self.fused(self.step), weight.is_cuda, {}

    @staticmethod
    @lru_cache(1) # so that it is said once
    def takes(model: GPT) -> bool:
        """Whether a Decoder can write this. If not, it prints why."""
        why = ("depths choose the layers of each token on the host" if len(model.routers) else
               "a memory is filled by the host's count of tokens" if model.memory is not None else "")
        if why:
            print(f"decoding kernel by kernel, not as a graph: {why}", file=sys.stderr)
        return not why

    def step(self):
        """position and ids -> both with one token more."""
        at = self.position[None] # a view, which moves with the position
        self.cache.length = self.position
        h = self.model.trunk(self.ids.index_select(1, at), self.cache) # (B, 1, C)
        p = self.model.logits(h)[:, -1] # (B, V)
        if self.sampling[0]: # the winner of this race is what torch.multinomial draws from the noise
            p = torch.div(distribution(p, *self.sampling), self.noise, out=self.noise)
        self.position += 1
        self.ids.index_copy_(1, at, p.argmax(-1, keepdim=True))
        self.h.index_copy_(1, at, h.type_as(self.h))

    def launch(self, run: Callable, position: int, count: int, width: int = 1):
        """`count` steps from this position, each of which writes at most `width` tokens."""
        front, last = self.cache.front, self.cache.front + position + count * width - 1 # the last place
        S = self.cache.bucket = min(front + self.cache.capacity, max(self.SHORTEST, 2 ** last.bit_length()))
        if self.captures:
            if (run, S) not in self.graphs:
                with torch.cuda.device_of(self.ids):
                    self.graphs[run, S] = capture(run, [self.position])
            run = self.graphs[run, S].replay
        for _ in range(count):
            for draw_anew in self.random:
                draw_anew(generator=self.generator)
            run()

    def write(self, n, most):
        """Launches steps behind the n tokens of the window -> how many tokens they write."""
        count = min(self.AHEAD, self.model.block_size + 1 - n, most)
        self.launch(self.run, n - 1, count)
        return count

    def refill(self, window):
        """Reads the window (B, n) but for its newest token, and for what the cache holds of it."""
        n, old, drafts = window.size(1), self.ids[:, : self.known].tolist(), self.model.config.n_ahead
        known = min(still_cached(self.cache, a, b, drafts) for a, b in zip(old, window.tolist()))
        self.cache.length, self.cache.bucket, self.known = known, 0, 0
        self.ids[:, :n] = window
        if known < n - 1:
            self.h[:, known + 1 : n] = self.model.trunk(window[:, known:-1], self.cache)
        self.position.fill_(n - 1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int) -> Iterator[torch.Tensor]:
        """Yields max_new_tokens tensors (B, 1), on the CPU. idx (B, T): the prompt."""
        check_sampling(idx.size(1), *self.sampling, max_new_tokens)
        self.forwards = self.tokens = 0 # of this text's drafts, if a DraftingDecoder writes it
        L, window = self.model.block_size, idx[:, window_start(idx.size(1), self.model.block_size) :]
        with evaluating(self.model):
            while max_new_tokens > 0: # once for each window
                n = window.size(1) # tokens there are
                self.refill(window)
                while n <= L and max_new_tokens > 0:
                    self.known = 0 # until the steps have ended: Ctrl-C may come before
                    count = self.write(n, max_new_tokens)
                    new = self.ids[:, n : n + min(count, max_new_tokens)].to("cpu", copy=True)
                    self.known = n + count - 1
                    for i, token in enumerate(new.split(1, dim=1), start=n):
                        self.seen = self.h[:, i : i + 1]
                        yield token
                    n, max_new_tokens = n + count, max_new_tokens - count
                if self.noise.isnan().any() or self.h.isnan().any(): # each later step has it too
                    raise ValueError(NOT_FINITE)
                window = self.ids[:, window_start(n, L) : n].clone()

    def steps(self, rows: list[list[int]], count: int) -> Iterator[list[list[int]]]:
        """What each of these rows of ids writes, step by step, until it is `count` tokens."""
        return (tokens.tolist() for tokens in self.stream(self.ids.new_tensor(rows), count))


def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, min_p: float = 0.0, speculative: bool = False,
             generator: torch.Generator | None = None, stop: Iterable[int] = (), use_cache: bool = True,
             watch: Callable | None = None) -> torch.Tensor:
    """GPT.generate, which describes it. idx (B, T) -> (B, T + new)."""
    if speculative and (watch or not use_cache):
        raise ValueError("speculative decoding needs its cache and forwards; drop use_cache=False and watch")
    check_sampling(idx.size(1), temperature, top_k, top_p, min_p, max_new_tokens)
    if not len(idx):
        return idx
    if speculative:
        writer = Speculation(model, idx, temperature, top_k, top_p, min_p, generator)
        return writer.generate(max_new_tokens, stop)
    tokens = stream(model, idx, max_new_tokens, temperature, top_k, top_p, min_p, generator, use_cache, watch)
    steps = (token.tolist() for token in tokens)
    return torch.tensor(until_stopped(idx.tolist(), steps, max_new_tokens, stop), device=idx.device)


def until_stopped(rows, steps, max_new_tokens, stop=()):
    """rows of ids and what each writes in each of the steps, until each has written a token of `stop`."""
    rows, stop = [list(row) for row in rows], set(map(int, stop))
    ends = [len(row) + max_new_tokens for row in rows]
    while any(len(row) < end for row, end in zip(rows, ends)): # complete rows go on until then
        for b, tokens in enumerate(next(steps)):
            stopped = [len(rows[b]) + i for i, token in enumerate(tokens, start=1) if token in stop]
            ends[b], rows[b] = min([ends[b], *stopped]), rows[b] + tokens
    longest = max(ends) # shorter rows repeat their last token
    return [row[:end] + row[end - 1 : end] * (longest - end) for row, end in zip(rows, ends)]


def generate_with_uncertainty(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                              stop: Iterable[int] = (), **sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """GPT.generate_with_uncertainty, which describes it."""
    stop, scores = list(stop), [model.embed.weight.new_zeros(idx.size(0), 0)]
    ids = generate(model, idx, max_new_tokens, temperature, **sampling, stop=stop,
                   watch=lambda h, logits: scores.append(model.uncertainty(h, logits)))
    written = ids[:, idx.size(1) :]
    ended = torch.isin(written, torch.tensor(stop, dtype=ids.dtype, device=ids.device)).cumsum(1) > 1
    return ids, torch.cat(scores, dim=1).masked_fill(ended, 0)


# --- speculative decoding -----------------------------------------------------------------------------------
# Draft some tokens cheaply, let the model judge all of them in one forward, and keep
# those that it would have written as well. Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023,
# arXiv:2302.01318. Why no probability changes: naive_judge has the rule and its proof, judge is the rule for
# a batch, and draft_and_judge applies it.


def naive_judge(p, q, draft, u, draw):
    """The rule for one draft of one row -> a token distributed as p, whatever q is.

    p and q (V,): the model's and the drafter's distributions; u: uniform in [0, 1); draw(p): a token of p.
    Proof: token t is drafted and kept with probability q_t min(1, p_t / q_t) = min(p_t, q_t). A rejection has
    the probability that is left, sum_t max(p_t - q_t, 0), and draws t with its share of that sum. So t is
    returned with probability min(p_t, q_t) + max(p_t - q_t, 0) = p_t.
    With n drafts the same holds for each in turn, given that those before it were kept. What follows the
    first rejection is dropped.
    """
    if u < p[draft] / q[draft]:
        return draft
    return draw((p - q).clamp(min=0)) # not normalised


def judge(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """naive_judge for many: model's p (B, n+1, V), drafter's q (B, n, V), drafts (B, n) -> keep, rest.
    keep (B, n): probability of keeping each draft if those before it were kept. rest (B, n+1, V), not
    normalised: what to draw from in place of the first rejected draft, or after the last draft.
    """
    token = drafts.unsqueeze(-1) # (B, n, 1)
    keep = (p[:, :-1].gather(2, token) / q.gather(2, token)).squeeze(2) # above 1: always
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0) # after the last draft: p itself
    return keep, torch.where(rest.sum(-1, keepdim=True) > 0, rest, p) # nothing is left where p = q: p


def draft_by_cell(model, s, x, races, sampling):
    """A draft of the Ahead cell for each of the races (n, 1 or B, V) -> drafts (B, n), their q (B, n, V).

    s (B, C): the trunk's output before the token x (B,). A race has exponential times: divided by q, the
    first to arrive is distributed as q. torch.multinomial draws so as well, from races of its own.
    """
    drafts, q = [], []
    for race in races:
        s = model.extras["ahead"](s, F.embedding(x, model.embed.weight)) # (B, C)
        logits = model.cap(widen(few_rows(s, model.head.weight))) # (B, V); calling no module saves time
        q.append(distribution(logits, *sampling))
        drafts.append(x := (q[-1] / race).argmax(-1)) # (B,)
    return torch.stack(drafts, dim=1), torch.stack(q, dim=1)


class Speculation(Text):
    """A text whose steps draft tokens and judge them, so that rows write at their own paces.

    Drafts come from the model's Ahead cell ("ahead"), or from what followed the last tokens where they
    occurred earlier in the text ("ngram"). "auto" takes the cell if there is one, and ngram while the text
    repeats itself. Drafting pauses where too few drafts are kept to pay for themselves.
    """
    TRIAL, PAUSE = 32, 512 # steps with drafts between two decisions; tokens of each row without drafts
    # Cost of drafting and judging one token, in plain forwards. Measured on a CPU with the model of
    # train_shakespeare_diffmla.py: judging eight tokens takes 0.35 more than one, seven drafts take 0.35.
    # A constant, not a timing: the same seed must write the same text on every machine.
    COST = 0.1

    def __init__(self, model: GPT, idx: torch.Tensor | list[list[int]], *how, draft: str = "auto", **named):
        if draft not in ("auto", "ahead", "ngram"):
            raise ValueError(f"draft={draft!r} is none of auto, ahead, ngram")
        has_cell = "ahead" in model.extras
        if draft == "ahead" and not has_cell:
            raise ValueError("draft=ahead needs a model trained with --n_ahead=7; else use draft=ngram")
        self.best = self.ahead if has_cell and draft != "ngram" else self.ngram
        self.source = self.repeated_or_best if draft == "auto" and has_cell else self.best
        self.n = min(model.config.n_ahead or 7, model.block_size - 1)
        super().__init__(model, idx, *how, **named)

    def go_on(self, rows):
        super().go_on(rows)
        # For ngram, of each row: {last tokens: the index that followed them}, and how far that is complete.
        self.followed, self.noted = [{} for _ in rows], [2] * len(rows)
        self.drafted = self.kept = 0 # of all rows
        self.trial, self.pause = Counter(), 0 # results of the latest forwards; tokens until the next trial

    def generate(self, max_new_tokens: int, stop: Iterable[int] = ()) -> torch.Tensor:
        """(B, T + new), as GPT.generate, of rows of one length."""
        return self.tensor(until_stopped(self.rows, iter(self.step, None), max_new_tokens, stop))

    def write(self):
        """Drafts n tokens for each row and judges them -> those kept, and the token behind them."""
        B, L = len(self.rows), self.model.block_size
        inside = [len(row) - start for row, start in zip(self.rows, self.starts)] # tokens in the window
        room = [min(self.n, L - m) if not self.pause else 0 for m in inside] # for drafts
        drafts, q, limits = self.source(room) # (B, n), (B, n, V), how many of the n each row takes
        n = drafts.size(1)
        last = self.tensor([row[-1:] for row in self.rows])
        h = self.seen = self.trunk(torch.cat([last, drafts], dim=1)) # (B, n+1, C)
        p = self.distribution(h) # (B, n+1, V)
        keep, rest = judge(p, q, drafts)
        for b, limit in enumerate(limits):
            if limit < n: # padding: keep = 0 ends the row here, and its next token is drawn from p itself
                keep[b, limit:], rest[b, limit] = 0, p[b, limit]
        u = torch.rand(B, n, device=self.device, generator=self.generator)
        kept = (u < keep).cumprod(1).sum(1) # (B,): drafts before the first rejection
        batch = torch.arange(B, device=self.device)
        tokens, self.h = self.draw(rest[batch, kept]), h[batch, kept] # (B, 1), (B, C)
        wrote = [row[:k] + token for row, k, token in zip(drafts.tolist(), kept.tolist(), tokens.tolist())]
        written = sum(map(len, wrote))
        self.decide_pause(sum(limits), written - B, written)
        return wrote

    def decide_pause(self, drafted, kept, written):
        """If drafts in TRIAL forwards saved less than they cost, each row's next PAUSE tokens have none."""
        self.drafted, self.kept = self.drafted + drafted, self.kept + kept
        self.pause = max(0, self.pause - written)
        self.trial.update(forwards=drafted > 0, drafted=drafted, kept=kept)
        if self.trial["forwards"] == self.TRIAL:
            if self.trial["kept"] < self.COST * self.trial["drafted"]:
                self.pause = self.PAUSE * len(self.rows) # pause counts the tokens of all rows
            self.trial.clear()

    # Drafters: room, the number of drafts that fit into each row -> drafts (B, n), the q (B, n, V) that they
    # were drawn from, and how many of the n each row takes.

    def ahead(self, room):
        """From the model's Ahead cell and its head."""
        if not any(room):
            return self.ngram(room) # which drafts nothing either, in the right shapes
        races = torch.empty(max(room), len(self.rows), self.model.config.vocab_size, device=self.device)
        races.exponential_(generator=self.generator)
        last = self.tensor([row[-1] for row in self.rows])
        return *draft_by_cell(self.model, self.h, last, races, self.sampling), room

    def ngram(self, room, lengths=(6, 4, 3, 2)):
        """From the text: looks up its last 6 tokens, else 4, 3 or 2, and drafts what followed them before."""
        drafts = []
        for b, (row, followed, limit) in enumerate(zip(self.rows, self.followed, room)):
            for end in range(self.noted[b], len(row)): # each index once, when a token stands there
                followed.update({tuple(row[end - m : end]): end for m in lengths if m <= end})
            self.noted[b] = len(row)
            start = next((followed[key] for m in lengths if (key := tuple(row[-m:])) in followed), len(row))
            period = len(row) - start # 0: no earlier occurrence; beyond the text these tokens repeat
            drafts.append([row[start + i % period] for i in range(limit if period else 0)])
        limits = [len(d) for d in drafts]
        drafts = self.tensor([d + [0] * (max(limits) - len(d)) for d in drafts])
        return drafts, F.one_hot(drafts, self.model.config.vocab_size).to(self.h.dtype), limits

    def repeated_or_best(self, room):
        """N-gram drafts if the last 6 tokens of every row occurred before; otherwise those of the cell."""
        drafts, q, limits = self.ngram(room, (6,))
        return (drafts, q, limits) if all(limits) else self.best(room)

    def __str__(self):
        share = self.kept / max(1, self.drafted)
        rate = f"{share:.0%} of {self.drafted:,} drafts kept" if self.drafted else "nothing drafted"
        return f"{self.tokens / max(1, self.forwards) / len(self.rows):.2f} tokens per forward, {rate}"


class DraftingDecoder(Decoder):
    """Speculation in steps of fixed shape, for one row: a graph drafts n tokens by the Ahead cell and judges
    them. At the end of a window, where n drafts have no room, tokens are written one by one.
    """
    STEPS = 4 # launched before their tokens are read

    def __init__(self, model: GPT, rows: int = 1, *sampling, **how): # as Decoder; rows is 1
        super().__init__(model, rows, *sampling, **how)
        self.n = min(model.config.n_ahead, model.block_size - 1)
        self.races = self.noise.repeat(self.n + 1, 1) # (n+1, V) each draft's, and the last token's
        self.u = self.races.new_full((1, self.n), 0.5)
        self.random += [self.races.exponential_, self.u.uniform_] if self.random else []
        self.run_drafts = self.fused(self.draft_and_judge)

    def draft_and_judge(self):
        model, at, sampling = self.model, self.position[None], self.sampling
        last = self.ids.index_select(1, at) # (1, 1), not yet in the cache
        h = self.h.index_select(1, at)[:, 0] # (1, C)
        drafts, q = draft_by_cell(model, h, last[:, 0], self.races[:-1], sampling)
        self.cache.length = self.position
        h = model.trunk(torch.cat([last, drafts], dim=1), self.cache) # (1, n+1, C)
        keep, rest = judge(distribution(model.logits(h), *sampling), q, drafts)
        kept = (self.u < keep).cumprod(1).sum(1) # (1,): drafts before the first rejection
        times = torch.div(rest.index_select(1, kept)[:, 0], self.races[-1], out=self.noise) # (1, V)
        token = times.argmax(-1, keepdim=True) # (1, 1)
        wrote = F.pad(drafts, (0, 1)).index_copy(1, kept, token) # (1, n+1), of which kept + 1 count
        places = at + 1 + torch.arange(self.n + 1, device=at.device)
        self.ids.index_copy_(1, places, wrote)
        self.h.index_copy_(1, places, h.type_as(self.h))
        self.position += kept[0] + 1

    def write(self, n, most):
        room = self.model.block_size + 1 - n
        count = min(self.STEPS, room // (self.n + 1), -(-most // (self.n + 1)))
        if not count:
            return super().write(n, most)
        self.launch(self.run_drafts, n - 1, count, self.n + 1)
        wrote = self.position.item() + 1 - n
        self.forwards, self.tokens = self.forwards + count, self.tokens + wrote
        return wrote

    def __str__(self):
        mean = self.tokens / max(1, self.forwards)
        return f"{mean:.2f} tokens per forward, {max(0, mean - 1) / self.n:.0%} of drafts kept"


# --- the command line ---------------------------------------------------------------------------------------

ADJUSTABLE = ["temperature", "top_k", "top_p", "min_p", "max_new_tokens"] # at the prompt
HELP = f"""a prompt a line; the model goes on from all that was said and written, and from the line as typed
/reset forgets that text; Ctrl-C stops an answer; exit, quit or the end of input ends
{", ".join(ADJUSTABLE)} can be set, as in temperature=0.5"""
_SHADES = (0, 230, 222, 215, 203) # of 256 colours, for a score below 0.2, 0.4, ...


def load(folder: str) -> tuple[GPT, str, str]:
    """(model, dtype of its training, a line about it) of best.pt, or of the newest checkpoint that is whole.
    folder: of a run, or one checkpoint; if empty, the folder below out (or out itself) written to last.
    """
    runs = glob.glob("out/*.pt") + glob.glob("out/*/*.pt")
    if not folder and not runs:
        raise UserError("there is no run below out yet\ntrain first: "
                        "python train.py config/train_shakespeare_diffmla.py, or name one: --out_dir=...")
    folder, damage = folder or os.path.dirname(max(runs, key=os.path.getmtime)), io.StringIO()
    try:
        with user_errors(), redirect_stderr(damage):
            state, path = load_run(folder)
    except UserError as error:
        why = damage.getvalue().removeprefix("WARNING: ").strip() or error
        way_out = f"train first, or train again: python train.py --out_dir={folder} ..."
        raise UserError(f"{why}\n{way_out}") from None
    print(damage.getvalue(), end="", file=sys.stderr)
    with user_errors():
        model = GPT.from_state(state, path)
    if model.tokenizer is None:
        raise UserError(f"{path} was trained on tokens without a tokenizer, so it can write no text\n"
                        "prepare the data with data.py")
    about = f"{path}: {model.config.attention}, {model.num_params():,} parameters, step {state['step']}"
    return model, state["config"]["train"]["dtype"], about


def piped_in() -> bool:
    """Whether a file is standard input, or a pipe in which something happens. Some service's never closes."""
    with suppress(OSError): # it is closed, or this system cannot tell
        mode = os.fstat(0).st_mode
        if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) and select.select([0], [], [], 1)[0]:
            return True
        if stat.S_ISFIFO(mode):
            print("nothing came through standard input in a second; --start=- waits longer, "
                  "< /dev/null not at all", file=sys.stderr)
    return False


def read_prompts(source: str) -> list[str]:
    """The prompts that --start stands for."""
    kind, path = ("FILE", "-") if source == "-" else source.partition(":")[::2]
    if kind not in ("FILE", "LINES") or not path:
        return [source]
    place = 0 if path == "-" else os.path.expanduser(path)
    try:
        with open(place, encoding="utf-8", closefd=bool(place)) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    if kind == "LINES":
        return [line for line in text.split("\n") if line.strip()]
    return [text if place else text.removesuffix("\n")] # echo writes a line end behind what is meant


def encode(text):
    """The ids of a prompt. UserError for characters that the model has never seen."""
    if unknown := tokenizer.unknown(text):
        raise UserError(f"the prompt {text[:40]!r} has characters that the model does not know: "
                        f"{' '.join(map(repr, unknown[:10]))}\nwrite it without them")
    ids, L = [int(i) for i in tokenizer.encode(text)], model.config.block_size
    if len(ids) > L and model.memory is None:
        print(f"the prompt has {len(ids)} tokens, the model reads at most the last {L}", file=sys.stderr)
    return ids


def safe(text):
    """Without control characters: model output must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or ord(c) >= 32 and not 127 <= ord(c) < 160)


def with_score(text, score):
    """The text as it is printed: with its score, if --uncertainty asked for that."""
    if not uncertainty:
        return text
    if lines:
        return f"{score:.2f}  {text!r}\n"
    shade = _SHADES[min(4, int(score * 5))]
    colour = rf"\033[30;48;5;{shade}m\g<0>\033[0m"
    return re.sub("[^\n]+", colour, text) if shade else text # a coloured line end would fill its line


class Continuation:
    """What one row writes behind its prompt: tokens, and text up to a stop."""

    def __init__(self, prompt, ids):
        self.prompt, self.text, self.finish, self.tokens, self.begin = prompt, "", "", [], len(ids)
        # Without the end of a document, behind which a model would forget what was said.
        self.ids, self.whole, self.context, self.read = list(ids), "", 0, len(ids) # see decode
        self.first = self.seconds = 0.0 # from the start to the first token, and to the latest
        self.shown, self.highest, self.printing = 0, 0.0, safe(prompt) + lines

    def print(self, end=""):
        ready, self.printing = self.printing, "" # a Ctrl-C behind print must not print it again
        print(ready, end=end, flush=True)

    def take(self, token, seconds):
        """Adds a token, as judged describes it, unless the text has ended."""
        if self.finish:
            return
        self.tokens.append(token)
        self.first, self.seconds = self.first or seconds, seconds
        self.highest = max(self.highest, token.get("uncertainty", 0.0))
        if token["id"] == tokenizer.eot:
            self.finish = "stop"
        else:
            self.ids.append(token["id"])
            self.finish = "length" if len(self.tokens) == max_new_tokens else ""
        self.show()

    def decode(self):
        """The text of all tokens. Only the newest are decoded, with the last ones that became text before
        them: some tokenizers drop the space in front of a text.
        """
        known = tokenizer.readable(self.ids[self.context : self.read])
        new = tokenizer.readable(self.ids[self.context :])[len(known) :]
        if not new or new.endswith("\ufffd"): # the sign for half a character: it waits for the rest
            return self.whole + new
        self.whole, self.context, self.read = self.whole + new, self.read, len(self.ids)
        return self.whole

    def show(self):
        """Adds to `printing` what will stay: no half of a character, nothing that may begin a stop string.
        Tokens that waited together are one piece, with the highest of their scores.
        """
        text = self.decode()
        found = [at for at in (text.find(string, self.shown) for string in stops) if at >= 0]
        self.text = text[: min(found, default=None)]
        self.finish = "stop" if found else self.finish
        sure = self.text if self.finish else text.rstrip("\ufffd")
        held = [n for string in stops for n in range(1, len(string)) if sure.endswith(string[:n])]
        end = len(sure) - (0 if self.finish else max(held, default=0))
        if end > self.shown:
            self.printing += with_score(safe(self.text[self.shown : end]), self.highest)
            self.shown, self.highest = end, 0.0


@lru_cache(2) # a conversation keeps its cache and graphs, until it changes how tokens are drawn
def writer_of(count, alike, speculative, *sampling):
    """A Decoder if `decode` asks for one, and all rows have one length (alike); else a Text."""
    graph = decode in ("graph", "compiled") or decode == "auto" and device.startswith("cuda")
    cell = count == 1 and draft != "ngram" and "ahead" in model.extras
    if graph and alike and (cell or not speculative) and Decoder.takes(model):
        kind = DraftingDecoder if speculative else Decoder
        return kind(model, count, *sampling, generator=generator, compile=decode == "compiled")
    if speculative:
        return Speculation(model, [[0]] * count, *sampling, generator, draft=draft)
    return Text(model, [[0]] * count, *sampling, generator)


@torch.no_grad()
def judged(wrote, seen):
    """The tokens that each row wrote, as --json shows them; the ids alone if nobody asked for more."""
    if not json and not uncertainty:
        return [[{"id": token} for token in tokens] for tokens in wrote]
    logits = model.logits(seen) # (B, n, V)
    logp, more = logits.log_softmax(-1), "uncertainty" in model.extras
    scores = model.uncertainty(seen, logits).tolist() if more else None
    return [[{"id": token, "text": tokenizer.readable([token]), "model_logprob": logp[b, i, token].item(),
              **({"uncertainty": scores[b][i]} if more else {})}
             for i, token in enumerate(tokens)] for b, tokens in enumerate(wrote)]


def answer(prompts, before=None):
    """Prints each prompt and its continuations; how fast they came, and from what model, on stderr.
    before: ids of each row that come before its prompt -> these, the prompts and the continuations.
    """
    texts = [Continuation(prompt, ids) for prompt in prompts for ids in [encode(prompt)] * num_samples]
    if not texts or max_new_tokens < 1:
        raise UserError("prompts, num_samples and max_new_tokens must be at least 1")
    before = before or [[]] * len(texts)
    rows = [old + text.ids for old, text in zip(before, texts)]
    shape, sampling = (len(rows), len({*map(len, rows)}) == 1), (temperature, top_k, top_p, min_p)
    with user_errors():
        check_sampling(min(len(text.ids) for text in texts), *sampling)
        writer = writer_of(*shape, speculative, *sampling)
    streamed, began = len(texts) == 1 and not json, time.perf_counter()
    if streamed:
        texts[0].print()
    try:
        for wrote in writer.steps(rows, max_new_tokens):
            seconds = time.perf_counter() - began
            for text, tokens in zip(texts, judged(wrote, writer.seen)):
                for token in tokens:
                    text.take(token, seconds)
                if streamed:
                    text.print()
            if all(text.finish for text in texts):
                break
    except KeyboardInterrupt:
        if not interactive:
            raise
        for text in texts: # it may come when take has added a token to the one list and not yet to the other
            del text.tokens[len(text.ids) - text.begin :]
    seconds, count = time.perf_counter() - began, sum(len(text.tokens) for text in texts)
    for text in texts:
        text.finish = text.finish or "interrupted"
        text.show()
        if json:
            print(dumps({"prompt": text.prompt, "text": text.text, "tokens": text.tokens,
                         "finish_reason": text.finish, "seconds_to_first_token": text.first,
                         "tokens_per_second": len(text.tokens) / max(text.seconds, 1e-9)}))
        else:
            text.print(end="" if lines else "\n")
            print("" if streamed else "---------------\n", end="")
    first = min(text.first for text in texts)
    print(f"{count} tokens, {count / seconds:.0f} tokens/s, the first after {first:.3f} s; {about}",
          file=sys.stderr)
    if speculative:
        print(writer, end="", file=sys.stderr)
        if count > len(rows) and not interactive: # there the next line would have to wait for it
            faster = speed_up(rows, count, writer, writer_of(*shape, False, *sampling))
            print(f"; {faster:.1f} times as fast as plain cached decoding", end="", file=sys.stderr)
        print(file=sys.stderr)
    return [old + text.ids for old, text in zip(before, texts)]


def speed_up(rows, count, *writers):
    """Speed of one of the two writers over that of the other: at most 100 tokens of each row, unprinted."""
    took, few = [], min(100, count // len(rows))
    for writer in writers:
        for _ in range(2): # the first time reads the prompt, warms up, and captures all graphs
            began = time.perf_counter()
            until_stopped(rows, writer.steps(rows, few), few)
            took.append(time.perf_counter() - began)
    return took[3] / took[1]


def converse(rows):
    """Answers the lines of standard input. Remarks and the sign of the prompt go to stderr."""
    sign = "> " if sys.stdin.isatty() else ""
    if sign:
        print(HELP, file=sys.stderr)
    while True:
        try:
            print(sign, end="", file=sys.stderr, flush=True)
            line = input()
        except (EOFError, KeyboardInterrupt):
            return print(file=sys.stderr)
        name, equals, value = (part.strip() for part in line.partition("="))
        try: # a slip costs the line, not the conversation
            if name in ("exit", "quit", "/exit", "/quit") and not equals:
                return
            if name in ("help", "/help") and not equals:
                print(HELP, file=sys.stderr)
            elif line.strip() == "/reset":
                rows = None
            elif equals and name in ADJUSTABLE:
                globals()[name] = checked(from_text, name, value, globals()[name], "typed here")
                print(f"{name} = {globals()[name]}", file=sys.stderr)
            elif line:
                rows = answer([line], rows)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    given = configure(globals())
    if not 0 <= seed < 2**64:
        raise UserError(f"seed={seed} must be in [0, 2**64)")
    if decode not in ("auto", "eager", "graph", "compiled"):
        raise UserError(f"decode={decode!r} is none of auto, eager, graph, compiled")
    if draft != "auto" and not speculative:
        raise UserError(f"draft={draft} is of speculative decoding; add --speculative, or drop it")
    if interactive and (start == "-" or start.startswith("LINES:")):
        raise UserError(f"start={start} and --interactive both ask for lines; drop one")
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = "\n" if uncertainty and not colours else "" # a token a line
    stops = [part.replace("\\n", "\n").replace("\\t", "\t") for part in stop.split("||") if part]
    if sys.stdin is None and (interactive or start in ("-", "FILE:-", "LINES:-")):
        raise UserError("standard input is closed; give the prompt by --start=..., and no --interactive")
    with user_errors():
        device, _ = choose_device(device)
        model, dtype, about = load(out_dir)
        piped = "start" not in given and not interactive and piped_in()
        prompts = read_prompts("-" if piped else start)
        prompts = [start] if piped and prompts == [""] else prompts # nothing came
        if uncertainty:
            model.uncertainty(model.embed.weight[:1]) # refuses where there is no head
        generator = torch.Generator(device).manual_seed(seed)
    model, tokenizer, model.cache_dtype = model.to(device).eval(), model.tokenizer, cache_dtype
    if device.startswith("cuda"): # half the bytes, and no cast of a weight for each token as under autocast
        model.to(getattr(torch, dtype))
    if model.num_params() < 3_000_000 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1) # as fast as two, and four times as fast beside another busy program
    with torch.no_grad(), redirect_stdout(sys.stderr): # a first forward compiles kernels.c, or says why not:
        model(torch.zeros(1, 1, dtype=torch.long, device=device)) # no part of the time to the first token
    rows = answer(prompts) if not interactive or "start" in given else None
    if interactive:
        converse(rows)
