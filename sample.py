"""
Prompt in, text out, from a checkpoint that train.py left behind (the tokenizer is inside it).

  python sample.py --out_dir=out/shakespeare_diffmla --start="ROMEO:"
  python sample.py --out_dir=out/shakespeare_diffmla --num_samples=4 --temperature=0.8 --top_p=0.95
  python sample.py --speculative                                          the newest run; the same distribution from fewer forwards
  python sample.py --uncertainty                                          how unsure the model was of each token; train with --uncertainty
  python sample.py --out_dir=out/shakespeare_diffmla --interactive        a prompt a line; `temperature=0.5` changes it; quit
"""
from configurator import UserError, checked, configure, from_text, user_errors # first: see stop_at_once there

import glob
import itertools
import os
import re
import sys
import time
from contextlib import nullcontext

import torch

from data import tokenizer_from_dict
from model import GPT, GPTConfig, Speculation, check_sampling, choose_device, load_checkpoint, previous_checkpoint

out_dir = "" # folder of the run; empty: the newest below out
start = "\n" # the prompt; FILE:prompt.txt reads it from a file
num_samples = 1 # continuations of the same prompt, drawn as one batch
max_new_tokens = 500 # length of each
temperature = 0.8 # below 1 sharper, above 1 wilder, 0 always the likeliest token
top_k = 0 # keep only the k likeliest tokens; 0 = all
top_p = 1.0 # keep the likeliest tokens that hold this share of the probability
min_p = 0.0 # keep tokens of at least this share of the likeliest one's probability
seed = 1337 # of the draws: the same seed writes the same text
speculative = False # guess several tokens, judge them in one forward, keep what the model would have written: faster, not different
draft = "auto" # where guesses come from: ahead (the n_ahead cell) | early (the first of depths) | ngram (the text so far) | auto
# with each token the probability that the likeliest one was wrong there, by a head trained with --uncertainty. On a terminal it is the
# background: none below 0.2, then from 0.2, 0.4, 0.6 and 0.8 on a step from pale yellow to red. Elsewhere, and where NO_COLOR is set,
# each token has a line: 0.12  'a'
uncertainty = False
interactive = False # ask for prompts until `quit`
device = "auto" # auto (cuda, else mps, else cpu) | cpu | cuda | mps

ADJUSTABLE = ["temperature", "top_k", "top_p", "min_p", "max_new_tokens"] # at the prompt
_SHADES = (0, 230, 222, 215, 203) # of 256 colours, for a score below 0.2, 0.4, ...


def newest_run():
    """The folder below out (or out itself) that a checkpoint was written to last."""
    checkpoints = glob.glob("out/*.pt") + glob.glob("out/*/*.pt")
    if not checkpoints:
        raise UserError("there is no run below out yet\n"
                        "train first: python train.py config/train_shakespeare_diffmla.py, or name one: --out_dir=...")
    return os.path.dirname(max(checkpoints, key=os.path.getmtime))


def load(folder, device):
    """Model, tokenizer, dtype and a line about the best checkpoint in the folder, or the newest if there is no best one yet."""
    folder = folder or newest_run()
    newest = os.path.join(folder, "ckpt.pt")
    found = [p for p in (os.path.join(folder, "best.pt"), newest, previous_checkpoint(newest)) if os.path.exists(p)]
    if not found:
        raise UserError(f"there is no checkpoint in {folder}\ntrain first: python train.py --out_dir={folder} ..., or name another")
    damage = []
    for path in found:
        try:
            state = load_checkpoint(path)
            break
        except ValueError as error:
            damage.append(str(error))
    else:
        raise UserError(f"{damage[0]}\nno checkpoint in {folder} is whole: train again")
    for line in damage:
        print(f"WARNING: {line}", file=sys.stderr)
    if state["tokenizer"] is None:
        raise UserError(f"{path} was trained on tokens without a tokenizer, so it can write no text\nprepare the data with data.py")
    codec = tokenizer_from_dict(state["tokenizer"], state["config"]["train"]["data_dir"]) # gpt2's files lie where the run had its data
    with user_errors():
        model = GPT.from_state(state, path)
    about = f"{path}: {state['config']['model']['attention']}, {model.num_params():,} parameters, step {state['step']}"
    return model.to(device).eval(), codec, state["config"]["train"]["dtype"], about


def encode(text):
    """Prompt -> ids (1, T). UserError for an empty one, and for characters that the model has never seen."""
    if not text:
        raise UserError('the prompt is empty; give at least one character, such as --start=A')
    if unknown := tokenizer.unknown(text):
        shown = " ".join(map(repr, unknown[:10]))
        raise UserError(f"the prompt has characters that the model does not know: {shown}\nwrite it without them")
    ids = torch.tensor([int(i) for i in tokenizer.encode(text)], device=device)[None]
    L = model.config.block_size
    if ids.size(1) > L and model.memory is None:
        print(f"the prompt has {ids.size(1)} tokens, the model reads at most the last {L}", file=sys.stderr)
    return ids


def safe(text):
    """Without control characters: model output must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or ord(c) >= 32 and not 127 <= ord(c) < 160)


def with_score(text, score):
    """The text as it is printed: with its score where that is asked for."""
    if not uncertainty:
        return text
    if lines:
        return f"{score:.2f}  {text!r}\n"
    shade = _SHADES[min(4, int(score * 5))]
    return re.sub("[^\n]+", rf"\033[30;48;5;{shade}m\g<0>\033[0m", text) if shade else text # a coloured line end would fill its line


def show(pairs):
    """
    Prints a continuation as its (token, score) come; returns how many. Half a character (a token may end inside one) waits for its rest,
    and has the highest of their scores.
    """
    written, shown, highest = [], 0, 0.0
    for new, score in pairs:
        if new == tokenizer.eot:
            break
        written.append(new)
        text, highest = safe(tokenizer.readable(written)), max(highest, score)
        if not text.endswith("\ufffd"):
            print(with_score(text[shown:], highest), end="", flush=True)
            shown, highest = len(text), 0.0
    rest = safe(tokenizer.readable(written))[shown:]
    print(with_score(rest, highest) if rest else "", end="" if lines else "\n")
    return len(written)


def continue_one(ids, writer):
    """Streams one continuation as it is drawn."""
    scores = [0.0]
    watch = (lambda *last: scores.append(model.uncertainty(*last).item())) if uncertainty else None
    plain = (new.item() for new in model.stream(ids, max_new_tokens, temperature, top_k, top_p, min_p, generator, watch=watch))
    return show((new, scores[-1]) for new in (itertools.islice(writer, max_new_tokens) if writer else plain))


def continue_many(ids, writer):
    """num_samples continuations in one batch, printed one below the other."""
    stop = () if tokenizer.eot is None else (tokenizer.eot,)
    write = model.generate_with_uncertainty if uncertainty else model.generate
    out = writer.generate(max_new_tokens, stop) if writer else write(
        ids, max_new_tokens, temperature, top_k, top_p, min_p, generator=generator, stop=stop)
    out, scores = out if uncertainty else (out, torch.zeros(out.shape))
    for i, (row, of_row) in enumerate(zip(out[:, ids.size(1) :].tolist(), scores.tolist())):
        if i:
            print(safe(tokenizer.readable(ids[0].tolist())), end=lines)
        show(zip(row, of_row))
        print("---------------")
    return num_samples * (out.size(1) - ids.size(1))


def answer(text):
    ids = encode(text).expand(num_samples, -1)
    with user_errors(), autocast:
        check_sampling(ids, temperature, top_k, top_p, min_p, max_new_tokens)
        writer = Speculation(model, ids, temperature, top_k, top_p, min_p, generator, draft) if speculative else None
    print(safe(text), end=lines, flush=True)
    with autocast:
        began = time.perf_counter()
        count = (continue_one if num_samples == 1 else continue_many)(ids, writer)
        print(f"{count} tokens, {count / (time.perf_counter() - began):.0f} tokens/s; {about}", file=sys.stderr)
        if writer:
            print(f"{writer}; {speed_up(writer, ids):.1f} times as fast as plain cached decoding", file=sys.stderr)


def speed_up(writer, ids):
    """Tokens per second of the writer's steps, against as many tokens (100 at most) written plainly now, nothing printed meanwhile."""
    few = max(1, min(100, writer.timed // num_samples))
    for count in (2, few): # the first time to warm up
        began = time.perf_counter()
        for _ in model.stream(ids, count, temperature, top_k, top_p, min_p):
            pass
    plain = few * num_samples / (time.perf_counter() - began)
    return writer.timed / max(writer.seconds, 1e-9) / plain


def adjust(line):
    """`temperature=0.5` typed at the prompt. True if the line was such a setting."""
    name, equals, value = (part.strip() for part in line.partition("="))
    if not equals or name not in ADJUSTABLE:
        return False
    try:
        globals()[name] = checked(from_text, name, value, globals()[name], "typed here")
        print(f"{name} = {globals()[name]}")
    except UserError as error:
        print(f"error: {error}")
    return True


def converse():
    print(f"a prompt a line; {', '.join(ADJUSTABLE)} can be set, as in temperature=0.5; quit ends")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if line.strip() == "quit":
            return
        if line and not adjust(line):
            try:
                answer(line)
            except UserError as error: # a slip costs the line, not the conversation
                print(f"error: {error}")
            except KeyboardInterrupt:
                print("\n(stopped)")


configure(globals())
if num_samples < 1 or max_new_tokens < 1:
    raise UserError("num_samples and max_new_tokens must be at least 1")
if not 0 <= seed < 2**64:
    raise UserError(f"seed={seed} must be in [0, 2**64)")
if draft != "auto" and not speculative:
    raise UserError(f"draft={draft} is of speculative decoding; add --speculative, or drop it")
if uncertainty and (speculative or interactive):
    other = "speculative" if speculative else "interactive"
    raise UserError(f"uncertainty is of plain decoding of one prompt; drop --uncertainty or --{other}")
lines = "\n" if uncertainty and (not sys.stdout.isatty() or os.environ.get("NO_COLOR")) else "" # a token a line, not colours
with user_errors():
    device, _ = choose_device(device)
    if start.startswith("FILE:"):
        try:
            start = open(start[5:], encoding="utf-8").read()
        except UnicodeDecodeError as error:
            raise UserError(f"{start[5:]} is not UTF-8 text: {error}") from None
    model, tokenizer, dtype, about = load(out_dir, device)
    if model.num_params() < 3_000_000 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1) # as fast as two here, and four times as fast beside another busy program
    if uncertainty:
        model.uncertainty(model.embed.weight[:1]) # refuses where there is no head
    generator = torch.Generator(device).manual_seed(seed)
half = device.startswith("cuda") and dtype != "float32"
autocast = torch.autocast("cuda", getattr(torch, dtype)) if half else nullcontext()
converse() if interactive else answer(start)
