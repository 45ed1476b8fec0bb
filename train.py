"""
Trains a model.py on a dataset of data.py. Settings first, then one loop, top to bottom.

  python train.py config/train_shakespeare_diffmla.py
  python train.py config/train_shakespeare_diffmla.py --n_layer=6 --out_dir=out/deeper      any setting, also of the model
  python train.py --out_dir=out/deeper --resume                                             goes on exactly where it was

out_dir afterwards: run.json (what ran), metrics.jsonl (what it measured), ckpt.pt (the newest state), ckpt.prev.pt (the
one before), best.pt (the lowest validation loss). On a CPU a run is a pure function of its settings, the torch version and
the number of threads: killed at any moment and resumed, it ends in the same bits. (GPU kernels may add in another order.)
"""
import configurator # first: see stop_at_once there

import hashlib
import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import time
import uuid
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields

import numpy as np
import torch

try:
    import fcntl
except ImportError:
    fcntl = None # Windows: there a run's folder is not guarded

import data
from configurator import UserError, configure, git_commit, user_errors
from kernels import choose_device, path_for, use_kernel
from model import (GPT, GPTConfig, load_checkpoint, preset, previous_checkpoint, save_checkpoint, saved_fields,
                   without_orphans)
from optim import Sparse, build_optimizer, declarations, find_hooks, run_update_hooks, watch

# --- run ---
out_dir = "out" # everything the run writes goes here
resume = False # go on from the newest good checkpoint in out_dir; settings not given again are taken from it
seed = 1337 # initial weights, dropout and the order of the data
model_size = "" # nano | micro | tiny | small | medium | large | xl | xxl: the model's defaults (model.py, PRESETS); empty: GPTConfig's
# --- data ---
dataset = "shakespeare" # a name under data_dir, a known dataset (python data.py list), or a path to text or shard_*.npy; prepared first
tokenizer = "" # char | ascii | byte | gpt2 | FILE.json (ours or of `tokenizers`); empty: as the data was prepared, else char
data_dir = "data" # where prepared datasets and downloads live
val_fraction = 0.1 # last part of the text, kept for validation (used when train.py prepares the data)
offline_dataset = "" # taken instead, aloud, when dataset has to be downloaded and cannot be; empty: stop
# --- optimization ---
batch_size = 16 # sequences per forward
windows = 1 # of block_size tokens in a sequence; only a memory (memory_slots) sees from one into the next
gradient_accumulation_steps = 1 # forwards per optimizer step
max_iters = 2000 # optimizer steps
optimizer = "adamw" # adamw | fadam | adam_mini | muon
learning_rate = 1e-3 # peak
weight_decay = 0.1 # on matrices and embeddings
beta1 = 0.9 # Adam's decay of the first moment
beta2 = 0.99 # Adam's decay of the second moment
grad_clip = 1.0 # largest norm of the gradient; 0 = no clipping
schedule = "cosine" # after warm-up: cosine | linear | wsd (constant, then linear over the last fifth) | constant
warmup_iters = 100 # steps of linear warm-up
lr_decay_iters = 0 # step at which min_lr is reached; 0 = max_iters
min_lr = 1e-4 # final learning rate
# --- sparse training (optim.py, Sparse); needs schedule=wsd ---
sparse = "" # skeleton_flesh | magnitude: which weights are zero is chosen while training; empty: none
sparse_density = 0.2 # share of the matrices' weights that are left at the end
sparse_interval = 100 # steps between choices
sparse_prune_rate = 0.3 # share of the active weights that a choice prunes; half as many grow back
sparse_boost = 1.0 # factor on the updates of weights that grew back
sparse_boost_steps = 50 # for so many steps
# --- hooks (optim.py); names with commas between them, each NAME, NAME=NUMBER or path/to/file.py:function ---
update_hooks = "" # identity | clip_by_layer | gradient_noise: on the gradients, before the step
forward_hooks = "" # activation_stats | stream_stats: numbers for the log, from a forward of their own
# --- evaluation and logging ---
eval_interval = 250 # steps between evaluations
eval_iters = 0 # random batches per evaluation; -1 = the whole validation split; 0 = that, or a part where it would take long
log_interval = 10 # steps between lines of the log
checkpoint_interval = 0 # steps between checkpoints; 0 = eval_interval
sample_prompt = "\n" # continued at each evaluation
sample_tokens = 100 # length of that continuation; 0 = none
# --- machine ---
device = "auto" # auto (cuda, else mps, else cpu) | cpu | cuda | cuda:1 | mps
dtype = "auto" # auto | float32 | bfloat16 | float16
compile = "auto" # torch.compile: auto (where it pays back within the run) | true | false
kernel = "auto" # of kernels.py: auto (Triton on CUDA, C on a CPU, else PyTorch) | triton | torch

given = configure(globals(), GPTConfig)
with user_errors():
    size = preset(model_size) # below everything given; a resumed run has its checkpoint's fields instead
typed = given.typed # names that the command line gave itself, unlike those of a config file
SETTINGS = [k for k, v in globals().items() if not k.startswith("_") and type(v) in (bool, int, float, str)]
# what a resumed run cannot change, besides the model
FIXED = {"seed", "model_size", "batch_size", "windows", "gradient_accumulation_steps", "optimizer", "weight_decay", "beta1", "beta2",
         "dtype", "kernel", "update_hooks", "sparse", "sparse_density", "sparse_interval", "sparse_prune_rate", "sparse_boost",
         "sparse_boost_steps"}
LOCAL = {"out_dir", "resume", "device"} # these are the command line's, not the checkpoint's
MAX_SKIPPED = 5 # non-finite batches in a row before the run stops; fp16 needs more while its loss scale falls

# ----------------------------------------------------------------------------------------------------------------------
# the run's folder, and the checkpoint to go on from


def own_folder(path):
    """Make the folder and lock it: two runs in one folder would mix their files. The lock ends with the process."""
    os.makedirs(path, exist_ok=True)
    lock = open(os.path.join(path, "lock"), "a", encoding="utf-8")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another train.py is writing to {path}; wait for it, or choose another --out_dir") from None
    return lock


def newest_good(path):
    """
    The newest checkpoint that is whole, or None if there is none at all; best.pt is one, when the others are gone. Damage is said
    aloud. A damaged file is moved out of the way: the next save would take it for the one before, and replace a whole one by it.
    """
    found = [p for p in (path, previous_checkpoint(path), os.path.join(out_dir, "best.pt")) if os.path.exists(p)]
    damaged = []
    for p in found:
        try:
            state = load_checkpoint(p)
        except ValueError as error:
            print(f"WARNING: {error}", flush=True)
            damaged.append(p)
            continue
        check_saved(state, p)
        for bad in damaged:
            os.replace(bad, bad + ".damaged")
            print(f"{bad} was moved to {bad}.damaged")
        print(f"RESUMING from {p}, step {state['step']}")
        return state
    if found:
        raise UserError(f"no checkpoint in {out_dir} is whole; start again without --resume (the old files are moved aside, not deleted)")
    print(f"NOTHING TO RESUME in {out_dir} yet: starting at step 0")
    return None


def check_saved(state, path):
    """UserError unless state is as train.py writes it, with settings that are there, of their types: it comes from a file, after all."""
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or [type(config.get(k)) for k in ("train", "model", "asked")] != [dict, dict, str]:
        raise UserError(f"{path} is not what this train.py writes\nuse the commit that wrote it, or train anew in another --out_dir")
    saved_fields(config["model"], path)
    strange = sorted(k for k, v in config["train"].items() if k not in SETTINGS or type(v) is not type(globals()[k]))
    if strange:
        raise UserError(f"{path} has settings that this train.py does not know: {', '.join(strange)[:200]}\n"
                        "use the commit that its run.json names, or train again")


def read_run(path):
    """run.json of the run that this folder holds, {} if there is none, or none that can be used: it was cut off, or edited."""
    name = os.path.join(path, "run.json")
    try:
        with open(name, encoding="utf-8") as f:
            found = json.load(f)
        check_saved(found, name)
        return {**found, "resumed": list(found.get("resumed", []))}
    except (OSError, ValueError, TypeError, RecursionError) as error: # a UserError is a ValueError
        if os.path.exists(name):
            print(f"WARNING: {name} is left aside: {str(error).splitlines()[0]}")
        return {}


def set_aside(path):
    """A fresh run in a used folder: what the last one left is moved to previous_1, previous_2, ... and never deleted."""
    names = ("ckpt.pt", "ckpt.prev.pt", "best.pt", "metrics.jsonl", "run.json", "ckpt.pt.damaged", "ckpt.prev.pt.damaged")
    old = [f for f in names if os.path.exists(os.path.join(path, f))]
    if old:
        aside = next(d for n in itertools.count(1) if not os.path.exists(d := os.path.join(path, f"previous_{n}")))
        os.makedirs(aside)
        for f in old:
            os.replace(os.path.join(path, f), os.path.join(aside, f))
        print(f"{path} held an earlier run: moved to {aside}")


def adopt(saved):
    """Settings of the earlier run, where the command line does not say otherwise; refuse what would make it another run."""
    usual = {f.name: f.default for f in fields(GPTConfig)} # of a field that the earlier run did not know yet
    saved["model"]["depths"] = tuple(saved["model"].get("depths", ())) # run.json has a list
    was, asked = {**usual, "model_size": "", **saved["train"], **saved["model"]}, {k: v for k, v in given.items() if v != "auto"}
    clash = [f"{k} was {was[k]!r}, now {v!r}" for k, v in asked.items() if k in {*FIXED, *usual} and v != was.get(k, v)]
    if clash:
        raise UserError(f"cannot resume with another {', '.join(clash)}\ndrop it, or train anew in another --out_dir")
    for k in ("update_hooks", "forward_hooks"):
        if ":" in was[k] and k not in asked: # else a checkpoint could run any file
            raise UserError(f"this run used code of a file: {k}={was[k]}\nif you trust it, name it again: --{k}={shlex.quote(was[k])}")
    for k, v in saved["train"].items():
        if k not in asked and k not in LOCAL:
            globals()[k] = v # check_saved has let through settings only, of their own types
        elif k not in LOCAL and v != asked[k]:
            print(f"{k} was {v!r} before this resume")


if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    raise UserError("train.py is one process on one device\nstart it with python train.py, without torchrun")
if resume and not os.path.isdir(out_dir):
    raise UserError(f"nothing to resume: there is no folder {out_dir}\ndrop --resume, or name the run's folder with --out_dir")
with user_errors():
    lock = own_folder(out_dir)
checkpoint_path = os.path.join(out_dir, "ckpt.pt")
with user_errors():
    checkpoint = newest_good(checkpoint_path) if resume else None
    began = read_run(out_dir) if resume else {}
resumed = checkpoint is not None
earlier = checkpoint["config"] if checkpoint else began.get("config") # killed before its first checkpoint: run.json has the settings
if earlier:
    adopt(earlier)
if min_lr > learning_rate > 0 and "min_lr" not in (typed if "learning_rate" in typed else given): # which nobody gave to this rate
    print(f"min_lr={min_lr} is above learning_rate={learning_rate}: lowered to {learning_rate / 10}")
    min_lr = learning_rate / 10
if not sparse:
    for k in [k for k in given if k.startswith("sparse_") and k not in typed]:
        print(f"{k}={given.pop(k)} of the config file is dropped: it needs sparse")

for bad, sentence in [
    (min(batch_size, gradient_accumulation_steps, eval_interval, log_interval) < 1,
     "batch_size, gradient_accumulation_steps, eval_interval and log_interval must be at least 1"),
    (min(max_iters, warmup_iters, lr_decay_iters, checkpoint_interval, sample_tokens) < 0,
     "max_iters, warmup_iters, lr_decay_iters, checkpoint_interval and sample_tokens must not be negative"),
    (eval_iters < -1, f"eval_iters={eval_iters} must be at least 0, or -1 for the whole validation split"),
    (windows < 1, f"windows={windows} must be at least 1"),
    (not 0 <= seed < 2**32, f"seed={seed} must be in [0, 2**32)"),
    (learning_rate <= 0, f"learning_rate={learning_rate} must be above 0"),
    (min_lr > learning_rate or min_lr < 0, f"min_lr={min_lr} must be between 0 and learning_rate={learning_rate}"),
    (min(weight_decay, grad_clip) < 0, "weight_decay and grad_clip must not be negative"),
    (not (0 <= beta1 < 1 and 0 <= beta2 < 1), f"beta1={beta1} and beta2={beta2} must be in [0, 1)"),
    (schedule not in ("cosine", "linear", "wsd", "constant"), f"schedule={schedule!r} is not one of: cosine, linear, wsd, constant"),
    (sparse and schedule != "wsd", f"sparse={sparse} chooses weights while the learning rate is constant; use --schedule=wsd"),
    (not sparse and [k for k in given if k.startswith("sparse_")], "sparse_... settings need --sparse=skeleton_flesh or magnitude"),
    (dtype not in ("auto", "float32", "bfloat16", "float16"), f"dtype={dtype!r} is not one of: auto, float32, bfloat16, float16"),
    (compile.lower() not in ("auto", "true", "false"), f"compile={compile!r} is not one of: auto, true, false"),
]:
    if bad:
        raise UserError(sentence)

# ----------------------------------------------------------------------------------------------------------------------
# the machine


def choose_dtype():
    if dtype != "auto":
        if dtype == "float16" and kind == "cpu":
            raise UserError("dtype=float16 needs a GPU: its gradients underflow without a loss scaler\nuse --dtype=float32 or bfloat16")
        return dtype, "as asked"
    if kind != "cuda":
        return "float32", "auto: on a CPU half precision is slower at small widths" if kind == "cpu" else "auto: the safe choice there"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "auto: the GPU has it"
    return "float16", "auto: the GPU has no bfloat16; with a loss scaler"


def choose_compile(model, tokens):
    """Compiling costs about a minute; used where the time it saves is twice that, by a fixed estimate, so that resume agrees."""
    if compile != "auto":
        return compile.lower() == "true", "as asked"
    speed, saves = {"cuda": (5e13, 0.4), "cpu": (1e11, 0.2)}.get(kind, (1, 0)) # FLOP/s in eager mode, share of time saved
    gain = saves * model.flops_per_token() * tokens / speed
    return gain > 110, f"auto: about {gain:.0f} s to gain, 55 s to compile"


# dense half-precision FLOP/s, from the makers' data sheets; the first name found in the device's name counts
PEAK = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
        "4090": 165e12, "3090": 71e12, "V100": 125e12, "Tesla T4": 65e12}

with user_errors():
    device, device_reason = choose_device(device)
    use_kernel(kernel)
kind = torch.device(device).type
dtype, dtype_reason = choose_dtype()
device_name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine()
peak = next((flops for name, flops in PEAK.items() if name in device_name), 0) if kind == "cuda" and dtype != "float32" else 0
autocast = nullcontext() if dtype == "float32" else torch.autocast(kind, getattr(torch, dtype))
scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")
if kind == "cuda":
    torch.set_float32_matmul_precision("high") # TF32: 10 bits of mantissa in matrix products, several times the speed
print(f"device {device} ({device_reason})   dtype {dtype} ({dtype_reason})   "
      f"kernels {path_for(torch.empty(1, dtype=getattr(torch, dtype), device=device))} ({kernel})")

# ----------------------------------------------------------------------------------------------------------------------
# data


def get_data(name):
    """The dataset, prepared first if it is not there."""
    if not data.find(name, data_dir):
        name = data.prepare(name, tokenizer, data_dir, val_fraction)
    found = data.load(name, data_dir)
    found.check(given, typed)
    return found


def same_data(saved):
    """On resume: the very data of the run, loaded and never prepared anew, whatever the network says by now."""
    name, asked = saved["train"]["dataset"], given.get("dataset", saved["asked"])
    place = data.find(asked, data_dir) # asked may be the path of a folder
    same = place is not None and place.name == name
    if not same and asked not in (name, saved["asked"]):
        raise UserError(f"cannot resume: {asked} is not the data this run was trained on, which is {name}\ndrop --dataset, or train anew")
    found = data.load(place if same else name, data_dir)
    changed = {k: v for k, v in given.items() if v != saved["train"].get(k)}
    found.check(changed, typed, resuming=True)
    return found


asked = earlier["asked"] if earlier else dataset
try:
    corpus = same_data(earlier) if earlier else get_data(dataset)
except data.DownloadError as error:
    if not offline_dataset:
        raise
    print(f"{error}\n\n*** {dataset.upper()} CANNOT BE DOWNLOADED: TRAINING ON {offline_dataset.upper()} INSTEAD. "
          "ITS LOSSES DO NOT COMPARE. ***\n")
    corpus = get_data(offline_dataset)
if corpus.tokenizer and sample_tokens and (not sample_prompt or corpus.tokenizer.unknown(sample_prompt)):
    if "sample_prompt" in given:
        raise UserError(f"sample_prompt={sample_prompt!r} is empty or has characters that {corpus.name} does not have; change it")
    sample_prompt = corpus.tokenizer.decode([int(corpus.train.shards[0][0])]) # a text without a newline: begin as it begins
dataset, data_dir = corpus.name, str(corpus.folder.parent) # what a resumed run must find again
try:
    prompt_ids = corpus.tokenizer.encode(sample_prompt).astype(np.int64) if corpus.tokenizer and sample_tokens else None
except data.DownloadError as error: # tokens made elsewhere: training needs no tokenizer
    print(f"{error}\nNO SAMPLES WILL BE WRITTEN")
    prompt_ids = None
if prompt_ids is not None and not len(prompt_ids): # a tokenizer that drops spaces leaves nothing of "\n"
    prompt_ids = corpus.train.shards[0][:1].astype(np.int64)
print(f"data {corpus.name}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, vocabulary {corpus.vocab_size:,}")

# ----------------------------------------------------------------------------------------------------------------------
# model and optimizer

for seeding in (torch.manual_seed, random.seed, np.random.seed): # the last two for code that a user may add
    seeding(seed)
with user_errors():
    chosen = earlier["model"] if earlier else {
        **size, "vocab_size": corpus.vocab_size, **without_orphans({k: given[k] for k in given if k not in SETTINGS}, typed)}
    if not earlier and given.get("memory_slots") and corpus.tokenizer and corpus.tokenizer.eot is not None:
        chosen.setdefault("document_token", corpus.tokenizer.eot)
    config = GPTConfig(**chosen)
    if windows > 1 and not config.memory_slots and "windows" not in typed and "memory_slots" in typed:
        print(f"windows={windows} of the config file is dropped: it needs a memory")
        windows = 1
    if windows > 1 and not config.memory_slots:
        raise UserError(f"windows={windows} needs a memory: nothing else sees from one into the next\nadd --memory_slots=16, or drop it")
    sequence = windows * config.block_size # tokens
    if config.vocab_size < corpus.vocab_size:
        raise UserError(f"vocab_size={config.vocab_size} is smaller than the {corpus.vocab_size} of {corpus.name}; drop --vocab_size")
    if windows > 1 and max(corpus.train.rows) <= sequence:
        raise UserError(f"windows={windows} of block_size={config.block_size} are {sequence} tokens, more than the {len(corpus.train):,} "
                        "of the text\nlower --windows")
    corpus.train.batch(0, 1, sequence, seed) # refuse too short a text now
    corpus.val.batch(0, 1, sequence, seed) if eval_iters > 0 else next(corpus.val.windows(sequence, 1))
    model = GPT(config).to(device)
    opt = build_optimizer(model, optimizer, learning_rate, weight_decay, (beta1, beta2))
    constant = warmup_iters, warmup_iters + int(0.8 * ((lr_decay_iters or max_iters) - warmup_iters)) # steps at the peak of wsd
    sparsity = Sparse(model, opt, sparse, sparse_density, sparse_interval, constant, sparse_prune_rate, sparse_boost,
                      sparse_boost_steps) if sparse else None
    hooks = {"forward": find_hooks("forward", forward_hooks), "update": find_hooks("update", update_hooks)}

if earlier and (checkpoint or began)["data_sha256"] != corpus.sha256:
    raise UserError(f"cannot resume: {data_dir}/{corpus.name} is not the data this run was trained on; prepare it as before")
tokens_per_step = batch_size * gradient_accumulation_steps * sequence
flops_per_step = model.flops_per_token() * tokens_per_step
compiling, compile_reason = choose_compile(model, tokens_per_step * max_iters)
compile = str(compiling).lower() # kept, so that a longer run that goes on from this one computes as it did
print(f"model {config.attention}: {model.num_params():,} parameters, {tokens_per_step:,} tokens a step, {max_iters:,} steps")


def random_states():
    """Every generator that a step may draw from. numpy's arrays as tensors: that is what weights_only loads."""
    name, keys, *rest = np.random.get_state()
    there = {"cuda": torch.cuda.get_rng_state_all, "mps": lambda: [torch.mps.get_rng_state()], "cpu": list}[kind]()
    return {"torch": torch.get_rng_state(), "device": there,
            "python": random.getstate(), "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest]}


def restore_random_states(s):
    torch.set_rng_state(s["torch"])
    if kind == "cuda" and s["device"]:
        torch.cuda.set_rng_state_all(s["device"])
    if kind == "mps" and s["device"]:
        torch.mps.set_rng_state(s["device"][0])
    random.setstate(s["python"])
    name, keys, *rest = s["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


run = {"run_id": began.get("run_id", uuid.uuid4().hex), "step": 0, "evaluated": -1, "best": math.inf, "skipped": 0, "skipped_in_a_row": 0,
       "time_s": 0.0, "metrics_bytes": 0, "unwritten": ""} # unwritten: lines of metrics.jsonl that a full disk did not take
if checkpoint:
    with user_errors():
        model.load(checkpoint["model"], checkpoint_path)
    opt.load_state_dict(checkpoint["optimizer"])
    if sparsity:
        sparsity.load_state_dict(checkpoint["sparse"])
    scaler.load_state_dict(checkpoint["scaler"])
    restore_random_states(checkpoint["random"])
    run = {k: checkpoint.get(k, v) for k, v in run.items()}
checkpoint = None # frees its memory

settings = {k: globals()[k] for k in SETTINGS}
run_config = {"train": settings, "model": asdict(config), "asked": asked} # asked: the dataset before any fallback


def snapshot():
    """The complete state after `step` steps; what resume needs and what sample.py needs."""
    return {**run, "model": model.state_dict(), "optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "config": run_config,
            "tokenizer": corpus.tokenizer.to_dict() if corpus.tokenizer else None, "data_sha256": corpus.sha256, "random": random_states(),
            "sparse": sparsity.state_dict() if sparsity else None}


def save(path, keep_previous):
    """True if written. A full disk must not end a run: the old checkpoint stays, the next interval tries again."""
    try:
        save_checkpoint(path, snapshot(), keep_previous)
        return True
    except (OSError, RuntimeError) as error: # torch.save reports a full disk as a RuntimeError
        if not os.path.isdir(out_dir):
            sys.exit(f"error: the folder {out_dir} is gone: stopped at step {run['step']}, nothing can be saved") # exit code 1
        free = shutil.disk_usage(out_dir).free
        say(f"WARNING: {path} WAS NOT WRITTEN ({error}); {free:,} bytes are free. The one before is kept; training goes on.")
        return False


def say(*words, **how):
    """print, for a run that nobody may be listening to any more: a closed pipe or a full disk behind `> log` costs the words alone."""
    try:
        print(*words, flush=True, **how)
    except OSError:
        with suppress(OSError): # stderr may be gone too
            print("stdout cannot be written: the run goes on, metrics.jsonl has its numbers", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # what waits in the buffer would fail again at exit


process = {"step": run["step"], "command": shlex.join([os.path.basename(sys.executable), *sys.argv]), "git_commit": git_commit(),
           "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
           "device": {"kind": kind, "name": device_name, "dtype": dtype, "threads": torch.get_num_threads()}}
hashed = {**run_config, "train": {k: v for k, v in settings.items() if k not in LOCAL}} # the same run in another folder is the same run
about = {"run_id": run["run_id"], **{k: began.get(k, v) for k, v in process.items() if k != "step"},
         "config_hash": hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16], "config": run_config,
         "hook_list": {kind: [name for name, _ in found] for kind, found in hooks.items()},
         "dataset": corpus.name, "data_sha256": corpus.sha256, "seed": seed, "n_params": model.num_params(),
         "resumed": began.get("resumed", []) + [process] * resume} # one entry for each process that went on
with user_errors():
    if not resumed:
        set_aside(out_dir) # only now: no slip above may touch the run that lies there
    with open(os.path.join(out_dir, "run.json.part"), "w", encoding="utf-8") as f:
        json.dump(about, f, indent=1)
    os.replace(f.name, os.path.join(out_dir, "run.json"))
    metrics = open(os.path.join(out_dir, "metrics.jsonl"), "ab", buffering=0)
if os.path.getsize(metrics.name) < run["metrics_bytes"]:
    print(f"WARNING: {metrics.name} is shorter than when the checkpoint was saved; its lines go on from here")
else:
    metrics.truncate(run["metrics_bytes"]) # lines after the checkpoint will be written again, by the same steps


def log(**line):
    """A line of metrics.jsonl."""
    full = bool(run["unwritten"])
    run["unwritten"] += json.dumps(line) + "\n" # ASCII: a character is a byte
    write_lines(said=full)


def write_lines(said=True):
    """Lines that wait go to metrics.jsonl. What a full disk does not take waits on, and is said once."""
    try:
        while run["unwritten"]:
            run["unwritten"] = run["unwritten"][metrics.write(run["unwritten"].encode()) :]
    except OSError as error:
        if not said:
            say(f"WARNING: {metrics.name} CANNOT BE WRITTEN ({error}). Its lines are kept in memory and in the checkpoints.")


def mark():
    """Notes in `run` how long it has trained and where metrics.jsonl stands, all of it on the disk before a checkpoint says so."""
    write_lines()
    with suppress(OSError): # a disk that is full or gone: save() says it
        os.fsync(metrics.fileno())
    run.update(time_s=time.monotonic() - clock, metrics_bytes=os.fstat(metrics.fileno()).st_size)


def finite(x):
    return x if math.isfinite(x) else None # JSON has no NaN


def density():
    """For the lines of a sparse run: the share of weights that are not held at zero."""
    return {"density": round(sparsity.density(), 6)} if sparsity else {}


# ----------------------------------------------------------------------------------------------------------------------
# helpers of the loop


def lr_at(step):
    """Learning rate of the step-th update, step from 0: linear warm-up, then the schedule down to min_lr."""
    end = lr_decay_iters or max_iters
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    done = min(1.0, (step - warmup_iters) / max(1, end - warmup_iters)) # 0 after warm-up, 1 at the end
    left = {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "wsd": min(1.0, (1 - done) / 0.2)}[schedule]
    return min_lr + left * (learning_rate - min_lr)


def evaluation_batches():
    """
    Batches of an evaluation, and how many targets they have. eval_iters 0 is the whole validation split, but where that would cost
    more than about a sixth of the time of training, windows spread evenly over it: the same ones each time.
    """
    if eval_iters > 0:
        batches = (corpus.val.batch(i, batch_size, sequence, seed) for i in range(eval_iters))
        return batches, eval_iters * batch_size * sequence
    # A forward costs a third of a step. At least 2^17, so that the split of TinyShakespeare is whole in any run.
    limit = max(2**17, eval_interval * tokens_per_step // 2) if eval_iters == 0 else 0
    return corpus.val.windows(sequence, batch_size, limit), corpus.val.targets(sequence, limit)


@torch.no_grad()
def evaluate():
    """Mean cross-entropy in nats per token over evaluation_batches, None if a signal asks to stop meanwhile."""
    model.eval()
    batches, of = evaluation_batches()
    total, count, began = 0.0, 0, time.monotonic()
    spoke = began
    for x, y in batches:
        with autocast:
            # never the compiled model: odd last batches would compile again
            _, losses = model(x.to(device), y.to(device), with_logits=False)
        total, count = total + losses["ce"].item() * y.numel(), count + y.numel()
        if caught:
            break
        now = time.monotonic()
        left = (of / count - 1) * (now - began)
        if now - spoke > 2 < left and (sys.stdout.isatty() or spoke == began): # on a terminal again and again, in a file once
            say(f"evaluating: {count:,} of {of:,} tokens, {left:.0f} s left",
                end="\r" if sys.stdout.isatty() else "\n")
            spoke = now
    model.train()
    return None if caught else total / count


def write_sample():
    """Text from the model as it stands, always with the same random numbers: a generator of its own leaves training's alone."""
    if prompt_ids is None:
        return {}
    prompt = torch.tensor(prompt_ids, device=device)[None]
    with autocast:
        ids = model.generate(prompt, sample_tokens, generator=torch.Generator(device).manual_seed(seed))
    return {"sample_text": corpus.tokenizer.readable(ids[0].tolist())}


def next_batch(step):
    """The micro-batches of a step: its data is a function of (seed, step) alone."""
    x, y = corpus.train.batch(step, batch_size * gradient_accumulation_steps, sequence, seed)
    if kind == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    return list(zip(x.split(batch_size), y.split(batch_size)))


def gradient(micro_batches):
    """Adds up the gradient of the losses over the micro-batches; returns the mean of each, as tensors."""
    means = {}
    for x, y in micro_batches:
        with autocast:
            _, losses = step_model(x, y, with_logits=False)
        scaler.scale(sum(losses.values()) / gradient_accumulation_steps).backward()
        means = {name: means.get(name, 0) + loss.detach() / gradient_accumulation_steps for name, loss in losses.items()}
    return means


def compiled_or_eager():
    """The model as the loop calls it. A failing compiler is said aloud and costs the speed, not the run."""
    print(f"compile {'on' if compiling else 'off'} ({compile_reason})")
    if not compiling:
        return model
    try:
        faster = torch.compile(model)
        x, y = next_batch(0)[0]
        with torch.random.fork_rng(), autocast: # the trial must not move dropout's generator
            sum(faster(x, y, with_logits=False)[1].values()).backward()
        opt.zero_grad()
        return faster
    except Exception as error: # whatever the compiler raises, eager mode computes the same
        print(f"WARNING: torch.compile FAILED, TRAINING IN EAGER MODE: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        opt.zero_grad()
        return model


caught = [] # signals that asked to stop


def on_signal(number, frame):
    caught.append(number)
    signal.signal(number, signal.SIG_DFL) # a second one ends the process at once
    with suppress(OSError): # Ctrl-C ends `| tee` first
        os.write(1, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode()) # print is not safe in a handler


# ----------------------------------------------------------------------------------------------------------------------
# the loop

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN: # the terminal is closed, and no nohup
    signal.signal(signal.SIGHUP, on_signal)
clock = time.monotonic() - run["time_s"] # of training; evaluation moves it on
step_model = compiled_or_eager()
saved_ok, window_time, window_steps = True, time.monotonic(), 0 # compiling counts as time, not as slow steps
model.train()
parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
# What learns beside the model, from detached numbers, is clipped by itself: the model's own steps are the same with and without it.
clipped = [[p for p, d in declarations(model).items() if d.detached == apart] for apart in (False, True)]
if resumed and run["step"] >= max_iters:
    say(f"NOTHING TO TRAIN: the run is at step {run['step']:,} and max_iters={max_iters:,}; give a larger --max_iters")
taken, there = evaluation_batches()[1], corpus.val.targets(sequence)
if eval_iters == 0 and taken < there:
    say(f"each evaluation takes {taken:,} of {there:,} validation tokens, in windows spread over them; --eval_iters=-1 takes all")
while True:
    step = run["step"]

    # once in a while: validation loss over the whole split, a sample, the best model
    if (step % eval_interval == 0 or step >= max_iters) and step != run["evaluated"] and not caught:
        paused = time.monotonic()
        val_loss = evaluate()
        if val_loss is None: # a signal: a resumed run evaluates here anew
            continue
        sample = write_sample() if math.isfinite(val_loss) else {}
        log(step=step, tokens=step * tokens_per_step, time_s=round(paused - clock, 3), val_loss=finite(val_loss), **density(), **sample)
        say(f"step {step}: val loss {val_loss:.4f}" + (f"   {sample['sample_text']!r}" if sample else ""))
        clock += time.monotonic() - paused
        window_time += time.monotonic() - paused
        run["evaluated"], before = step, run["best"]
        mark()
        if val_loss < before and (not sparsity or sparsity.reached): # a denser model is not what was asked for
            run["best"] = val_loss
            if not save(os.path.join(out_dir, "best.pt"), keep_previous=False):
                run["best"] = before # the next one that is better than what the file holds will be kept

    # once in a while, and at the end: the checkpoint
    done = caught or step >= max_iters
    if done or (step and step % (checkpoint_interval or eval_interval) == 0):
        mark()
        saved_ok = save(checkpoint_path, keep_previous=True)
    if done:
        break

    # one step
    lr = lr_at(step)
    for group in opt.param_groups:
        group["lr"] = lr
    if sparsity and sparsity.choose(step):
        say(f"step {step}: {sparsity.active():,} of {sparsity.total:,} weights kept, {sparsity.to_grow:,} will grow back")
    micro_batches = next_batch(step)
    beside = gradient(micro_batches)
    scaler.unscale_(opt)
    noted = run_update_hooks(hooks["update"], step, parameters)
    if sparsity:
        sparsity.mask_gradients(step)
    norms = [torch.nn.utils.clip_grad_norm_(part, grad_clip or math.inf).item() for part in clipped if part]
    beside = {name: float(v) for name, v in beside.items()}
    loss = beside.pop("ce")
    norm = norms[0]
    if not math.isfinite(sum(norms[1:])): # it must not cost the model a batch either
        say(f"step {step}: what learns beside the model has a gradient of norm {norms[1]}, AND SKIPS THIS BATCH")
        for p in clipped[1]:
            p.grad = None
    if math.isfinite(loss + norm + sum(v for name, v in beside.items() if name not in model.extras)):
        scaler.step(opt)
        if sparsity:
            sparsity.finish(step)
        run["skipped_in_a_row"] = 0
    else: # neither the weights nor the optimizer's moments ever see it
        run["skipped"] += 1
        run["skipped_in_a_row"] += 1
        say(f"step {step}: loss {loss}, gradient norm {norm}: BATCH SKIPPED ({run['skipped']} so far)")
        if run["skipped_in_a_row"] > (MAX_SKIPPED if dtype != "float16" else 4 * MAX_SKIPPED):
            print(f"stopped: {run['skipped_in_a_row']} non-finite batches in a row. Lower --learning_rate or use --dtype=float32; "
                  f"{checkpoint_path} holds the last saved state.", file=sys.stderr)
            sys.exit(1)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    run["step"], window_steps = step + 1, window_steps + 1

    # a line of the log
    if run["step"] % log_interval == 0 or run["step"] == max_iters:
        now = time.monotonic()
        rate = window_steps / max(now - window_time, 1e-9) # steps per second since the last line
        window_time, window_steps = now, 0
        if hooks["forward"]:
            with autocast:
                noted.update(watch(model, hooks["forward"], *micro_batches[0]))
        noted = {"hooks": {name: {k: finite(float(v)) for k, v in result.items()} for name, result in noted.items()}} if noted else {}
        log(step=run["step"], tokens=run["step"] * tokens_per_step, time_s=round(now - clock, 3), train_loss=finite(loss),
            **{name: finite(v) for name, v in beside.items()}, lr=lr, grad_norm=finite(norm),
            tokens_per_s=round(rate * tokens_per_step), **density(), **noted)
        mfu = f"  MFU {flops_per_step * rate / peak:.1%}" if peak else ""
        say(f"step {run['step']:>6}/{max_iters}  loss {loss:.4f}  lr {lr:.2e}  grad {norm:.2f}  {rate * tokens_per_step:,.0f} tokens/s"
              f"{mfu}  {(max_iters - run['step']) / rate:,.0f} s left")

say(f"step {run['step']}: {run['time_s']:.1f} s of training, best val loss {run['best']:.4f}"
      + (f", {run['skipped']} batches skipped" if run["skipped"] else "")
      + (", THE LAST LINES OF metrics.jsonl NOT WRITTEN" if run["unwritten"] else "")
      + f", {'saved in' if saved_ok else 'NOT SAVED in'} {out_dir}")
sys.exit(1 if not saved_ok else 128 + caught[0] if caught else 0)
