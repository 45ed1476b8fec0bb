"""Trains a model of model.py on a dataset of data.py. The file is one story; the training loop is its end.

  python train.py config/train_shakespeare_diffmla.py
  python train.py config/train_shakespeare_diffmla.py --n_layer=6 --out_dir=out/deeper    any setting
  python train.py --out_dir=out/deeper --resume                          goes on where it stopped
  python train.py --resume=out/deeper/step_000500.pt                     goes on from there
  python train.py --init_from=gpt2 --out_dir=out/tuned                   begins with given weights
  python train.py --eval_only --init_from=gpt2                           prints their validation loss
  torchrun --nproc_per_node=4 train.py config/train_shakespeare_diffmla.py               on 4 processes

A run leaves in out_dir: run.json (what ran), metrics.jsonl (what it measured), ckpt.pt (the newest state),
ckpt.prev.pt (the state before), best.pt (the state of lowest validation loss) and, with --keep_checkpoints=N,
the newest N states as step_000500.pt. sample.py --out_dir=FILE.pt reads any of them. On a CPU a run is a pure
function of its settings, the torch version and the number of threads: killed at any moment and resumed, it
ends in the same bits. GPU kernels may add numbers in another order.

N processes share out the rows of each global batch, the validation windows and Muon's matrices. They take the
steps of one process, up to rounding and dropout, and a run may be resumed on another N. All need one out_dir
and one data_dir, so several machines need a common file system. The first process alone writes and prints.
--fsdp shares out weights, gradients and the optimizer's state too; checkpoints are the same with and without.
"""
import configurator # first: see stop_at_once there

import gc
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
import weakref
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import data
from configurator import UserError, configure, git_commit, out_of_memory, report, user_errors
from kernels import choose_device, cpu_has_bf16, path_for, use_kernel
from model import (GPT, MAY_CHANGE, GPTConfig, link_checkpoint, load_checkpoint, preset, save_checkpoint,
                   saved_fields, step_of, without_orphans)
from optim import (LATE, Sparse, build_optimizer, declarations, find_hooks, run_update_hooks, share_of,
                   step_where_finite, watch, whole)

# --- run ---
out_dir = "out" # everything the run writes goes here
resume = False # go on from the newest whole checkpoint in out_dir, or from a chosen one: --resume=FILE.pt
init_from = "" # start from these weights: gpt2 | gpt2-medium | ... | FOLDER | FILE.pt; empty: at random
seed = 1337 # initial weights, dropout and the order of the data
model_size = "" # nano | micro | tiny | small | medium | large | xl | xxl (model.py, PRESETS); empty: none
# --- data ---
dataset = "shakespeare" # a name in data_dir, one of python data.py list, or a path of text or shard_*.npy
tokenizer = "" # char | ascii | byte | gpt2 | FILE.json (ours or of `tokenizers`); empty: the data's or char
data_dir = "data" # folder of prepared datasets and downloads
stream = False # read dataset (a corpus of the hub, or a path) while training, without preparing it before
val_fraction = 0.1 # share of a text kept for validation: its end where it is prepared, its start with stream
sampling = "random" # windows of the text: random (any place) | epochs (each once, then all again elsewhere)
offline_dataset = "" # taken instead, aloud, if dataset cannot be downloaded; empty: stop
# --- optimization ---
batch_size = 16 # sequences per forward
windows = 1 # of block_size tokens in a sequence; only a memory (memory_slots) sees from one into the next
gradient_accumulation_steps = 1 # forwards per optimizer step
auto_batch = False # where memory runs out: fewer sequences in a forward, and more forwards for the same step
max_iters = 2000 # optimizer steps
optimizer = "adamw" # adamw | fadam | adam_mini | muon
learning_rate = 1e-3 # peak
weight_decay = 0.1 # on matrices and embeddings
beta1 = 0.9 # Adam's decay of the first moment
beta2 = 0.99 # Adam's decay of the second moment
grad_clip = 1.0 # largest norm of the gradient; 0 = no clipping
skip_spikes = 0.0 # skip a batch with a loss or norm so many deviations above 128 steps' mean, say 8; 0 = off
schedule = "cosine" # after warm-up: cosine | linear | wsd (constant, linear over the last fifth) | constant
warmup_iters = 100 # steps of linear warm-up
lr_decay_iters = 0 # step at which min_lr is reached; 0 = max_iters
min_lr = 1e-4 # final learning rate
# --- sparse training (optim.py, Sparse); needs schedule=wsd ---
sparse = "" # skeleton_flesh | magnitude: which weights are zero is chosen while training; empty: none
sparse_density = 0.2 # share of the matrices' weights that is left at the end
sparse_interval = 100 # steps between choices
sparse_prune_rate = 0.3 # share of the active weights that a choice prunes; half as many grow back
sparse_boost = 1.0 # factor on the updates of weights that grew back
sparse_boost_steps = 50 # steps that sparse_boost lasts
# --- hooks (optim.py); names with commas between them, each NAME, NAME=NUMBER or path/to/file.py:function ---
update_hooks = "" # identity | clip_by_layer | gradient_noise: on the gradients, before the step
forward_hooks = "" # activation_stats | stream_stats: numbers for the log, from a forward of their own
# --- evaluation and logging ---
eval_interval = 250 # steps between evaluations
eval_iters = 0 # random batches per evaluation; -1: all validation data; 0: all, or a part if it is long
log_interval = 10 # steps between lines of the log
checkpoint_interval = 0 # steps between checkpoints; 0 = eval_interval
keep_checkpoints = 0 # newest checkpoints that also stay under names of their own, as in step_000500.pt
sample_prompt = "\n" # continued at each evaluation
sample_tokens = 100 # length of that continuation; 0 = none
eval_only = False # with resume or init_from: evaluate the checkpoint, print its loss, and end
tensorboard = False # the log for TensorBoard too, in out_dir/tensorboard
wandb = False # the log to Weights & Biases too; with WANDB_MODE=offline in the environment, into out_dir
wandb_project = "nanoslm" # of Weights & Biases
# --- machine ---
device = "auto" # auto (cuda, else mps, else cpu) | cpu | cuda | cuda:1 | mps
dtype = "auto" # auto | float32 | bfloat16 | float16
compile = "auto" # torch.compile: auto (where it pays back within the run) | true | false
fsdp = False # each process keeps its share of weights, gradients and optimizer state: FSDP2, with torchrun
kernel = "auto" # of kernels.py: auto (Triton on CUDA, C on a CPU, else PyTorch) | triton | torch

DEFAULTS = {k: v for k, v in globals().items() if k[0] != "_" and type(v) in (bool, int, float, str)}
STARTED = time.monotonic()

# --- several processes --------------------------------------------------------------------------------------

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK")) # torchrun sets these
WORLD = int(os.environ.get("WORLD_SIZE", 1)) # number of processes
TIMEOUT = timedelta(minutes=10) # for an answer of the others; the first must write a checkpoint in that time
store = None # a small dictionary that all processes share


def report_once(error_type: type, error: BaseException, trace: object) -> None:
    """sys.excepthook of several processes: the first to fail says why. The others fail in silence."""
    mine = f"{RANK} {2 if issubclass(error_type, UserError) else 1}" # the second is the exit code
    first = mine
    with suppress(RuntimeError): # the process that holds the store is gone
        first = store.compare_set("failed", "", mine).decode() if store else mine
    if first != mine:
        time.sleep(1) # torchrun ends all processes after one: let the first finish its words
        os._exit(int(first.split()[1]))
    if issubclass(error_type, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        print(f"stopped: another process of this run has died, or gave no answer for {TIMEOUT}\n"
              f"--resume goes on from the newest checkpoint ({str(error)[:150]})", file=sys.stderr)
        os._exit(1) # at once: the end of an interpreter may wait for the process group
    report(error_type, error, trace)


def from_first(key: str, *values: object) -> list:
    """The first process's values, in every process. The others wait for it, and end where it fails."""
    if WORLD > 1 and not RANK:
        store.set(key, json.dumps(values))
    while RANK and not store.check([key]):
        if store.check(["failed"]):
            os._exit(int(store.get("failed").split()[1]))
        time.sleep(0.1)
    return json.loads(store.get(key)) if RANK else list(values)


if WORLD > 1:
    configurator.report = sys.excepthook = report_once # configure() makes configurator.report the hook again
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE={WORLD} asks for several processes, but MASTER_ADDR is not set\n"
                        "start them with torchrun, or unset WORLD_SIZE")
    if RANK:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1) # also for what a signal handler or a compiler prints
    store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store,
                            rank=RANK, world_size=WORLD, timeout=TIMEOUT)
with redirect_stderr(open(os.devnull, "w")) if RANK else nullcontext(): # settings are listed once
    given = configure(globals(), GPTConfig) # {setting or field of GPTConfig: value} of files and flags

typed = given.typed # the names in it that the command line gave
SPARSE = ("sparse_density", "sparse_interval", "sparse_prune_rate", "sparse_boost", "sparse_boost_steps")
# setting: the setting that it needs, and a value of that. A stream takes each window once an epoch anyway
NEEDS = {**dict.fromkeys(SPARSE, ("sparse", "skeleton_flesh")), "windows": ("memory_slots", 16),
         "sampling": ("stream", False), "model_size": ("init_from", ""), "wandb_project": ("wandb", True)}
# a resumed run cannot change these, nor the model
FIXED = {"seed", "init_from", "model_size", "stream", "sampling", "batch_size", "windows",
         "gradient_accumulation_steps", "optimizer", "dtype", "weight_decay", "beta1", "beta2", "kernel",
         "update_hooks", "sparse", *SPARSE}
LOCAL = {"out_dir", "resume", "device", "fsdp", "eval_only"} # a resumed run takes these from its own line
MAX_SKIPPED = 5 # steps skipped in a row that are tolerated; 4 times as many in fp16

# --- resume -------------------------------------------------------------------------------------------------

source = Path(resume) if type(resume) is str else None # the chosen checkpoint
if source and "out_dir" not in typed: # that of a config file is where a new run begins
    out_dir = str(source.parent)
resume = bool(resume)
origin = source.parent if source else Path(out_dir) # the folder of the earlier run


def saved_state() -> dict | None:
    """The chosen checkpoint, else the newest whole one, at worst best.pt. None if there is none at all."""
    newest = [folder / "ckpt.pt", folder / "ckpt.prev.pt", *reversed(kept_checkpoints()), folder / "best.pt"]
    for path in [source] if source else filter(Path.exists, newest):
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            if source:
                raise
            print(f"WARNING: {error}")
            if not eval_only: # the next save would make it ckpt.prev.pt, and overwrite a whole one
                print(f"{path} was moved to {path.replace(f'{path}.damaged')}")
            continue
        check_saved(state, path)
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights alone, and no run to resume\nuse --init_from={path}")
        print(f"RESUMING from {path}, step {state['step']}")
        return state
    if any(folder.glob("*.pt.damaged")):
        raise UserError(f"no checkpoint in {out_dir} is whole\n"
                        "start again without --resume (the old files are moved aside, not deleted)")
    print(f"NOTHING TO RESUME in {out_dir} yet: starting at step 0")


def kept_checkpoints() -> list[Path]:
    """Those of keep_checkpoints in the run's folder, in the order of their steps."""
    named = [f for f in folder.glob("step_*.pt") if f.stem[5:].isdecimal()]
    return sorted(named, key=lambda f: int(f.stem[5:]))


def check_saved(state: dict, path: str | Path) -> None:
    """UserError unless state has what train.py writes, with known settings of the right types."""
    config = state.get("config") if isinstance(state, dict) else None
    kinds = [type(config.get(k)) for k in ("train", "model", "asked")] if isinstance(config, dict) else []
    if kinds != [dict, dict, str]:
        raise UserError(f"{path} is not what this train.py writes\n"
                        "use the commit that wrote it, or train anew in another --out_dir")
    saved_fields(config["model"], path)
    kinds = {k: type(v) for k, v in DEFAULTS.items()}
    strange = sorted(k for k, v in config["train"].items() if type(v) is not kinds.get(k))
    if strange:
        raise UserError(f"{path} has settings that this train.py does not know: {', '.join(strange)[:200]}\n"
                        "use the commit that its run.json names, or train again")


def checksum(values: dict) -> str:
    """The sha256 of values, as JSON has them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_run() -> dict:
    """run.json of the earlier run; {} if there is none, or if it was cut off or edited."""
    path = origin / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        check_saved(found, path)
        if found.pop("sha256", None) not in (None, checksum(found)): # older runs have none
            raise ValueError("its values do not match their sha256")
        return {**found, "resumed": list(found.get("resumed", []))}
    except (OSError, ValueError, TypeError, RecursionError) as error: # a UserError is a ValueError
        if path.exists():
            print(f"WARNING: {path} is left aside: {str(error).splitlines()[0]}")
        return {}


def adopt(config: dict) -> None:
    """Takes over the settings of the earlier run. UserError if the command line asks for another run."""
    config["model"]["depths"] = tuple(config["model"].get("depths", ())) # run.json has a list
    usual = {f.name: f.default for f in fields(GPTConfig)} # for fields that the earlier run did not know yet
    was = {**DEFAULTS, **usual, **config["train"], **config["model"]}
    if was["init_from"]: # its weights and tokenizer were taken, whatever a config file says
        for k in given.keys() & {*usual, "tokenizer"} - typed:
            del given[k]
    # what a config file gave without effect was dropped when the run began, and is dropped again
    kept = without_orphans({k: v for k, v in given.items() if k in usual}, typed)
    idle = {k for k, (owner, value) in NEEDS.items() if bool(was[owner]) != bool(value) and k not in typed}
    idle |= given.keys() & usual.keys() - kept.keys()
    idle |= {"dtype"} - typed # a file's bfloat16 may have become float32
    asked = {k: v for k, v in given.items() if v != "auto" and k not in LOCAL and k not in idle}
    changed = {k: v for k, v in asked.items() if v != was[k]}
    clash = [f"{k} was {was[k]!r}, now {v!r}" for k, v in changed.items() if k in FIXED or k in usual]
    if clash:
        raise UserError(f"cannot resume with another {', '.join(clash)}\ndrop it, or take another --out_dir")
    # a checkpoint may not choose code that runs
    code = [k for k in ("update_hooks", "forward_hooks") if ":" in was[k] and k not in asked]
    if code:
        raise UserError("this run used code of a file\nif you trust it, name it again: "
                        + " ".join(f"--{k}={shlex.quote(was[k])}" for k in code))
    for k in changed:
        print(f"{k} was {was[k]!r} before this resume")
    globals().update({k: v for k, v in config["train"].items() if k not in asked and k not in LOCAL})
    place, name = data.find(dataset, data_dir), config["train"]["dataset"]
    if dataset == config["asked"] and (place is None or place.name != name):
        globals()["dataset"] = name # it was asked for by a path, or offline_dataset was taken for it
    elif dataset != name and (place is None or place.name != name): # before anything is downloaded
        raise UserError(f"cannot resume: {dataset} is not the data this run was trained on, {name}\n"
                        f"drop --dataset, or take the weights alone: --init_from={source or origin}")


def random_states() -> dict:
    """The state of every random generator."""
    name, keys, *rest = np.random.get_state()
    keys = torch.from_numpy(keys.astype(np.int64)) # load_checkpoint accepts tensors, but no numpy arrays
    on_device = [] if kind == "cpu" else [torch.get_device_module(kind).get_rng_state(*device_index)]
    return {"torch": torch.get_rng_state(), "device": on_device, "python": random.getstate(),
            "numpy": [name, keys, *rest]}


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if kind != "cpu" and states["device"]:
        torch.get_device_module(kind).set_rng_state(states["device"][0], *device_index)
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))


def snapshot() -> dict:
    """The state of the run after run["step"] steps: all that restore and sample.py need."""
    def gathered(x): # only the first process has room for the whole; all must ask for it
        return x if (full := whole(x)) is x else None if RANK else full.cpu()

    weights, moments = tree_map(gathered, (model.state_dict(), opt.state_dict()))
    return {**run, "model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
            "sparse": sparsity.state_dict() if sparsity else None, "recent": recent,
            "random": random_states(), "config": run_config, "tokenizer": codec.to_dict() if codec else None,
            "data_sha256": corpus.sha256, "stream": corpus.train.place(run["step"] * rows)}


def restore(state: dict) -> None:
    """Puts a snapshot back. UserError if its weights are those of another model.py."""
    now = model.state_dict()
    with user_errors():
        weights = {k: share_of(v, now.get(k)) for k, v in state["model"].items()}
        model.load(weights, source or folder / "ckpt.pt")
    opt.load_state_dict(state["optimizer"])
    for p, moments in opt.state.items():
        moments.update({k: share_of(v, p) for k, v in moments.items() if getattr(v, "shape", 0) == p.shape})
    scaler.load_state_dict(state["scaler"])
    if sparsity:
        sparsity.load_state_dict(state["sparse"])
    recent.copy_(state.get("recent", recent))
    set_random_states(state["random"])
    run.update({k: state[k] for k in run if k in state})


# --- the run's folder and settings --------------------------------------------------------------------------

folder = Path(out_dir)
if resume and not (source or folder).exists(): # before a misspelt path makes a folder
    there = sorted(str(f) for place in {origin, folder} for f in place.glob("*.pt"))
    raise UserError(f"cannot open {source or folder}: No such file\n"
                    + (f"there are {', '.join(there[-6:])}" if there else "drop --resume, or correct it"))
with user_errors():
    if RANK:
        from_first("folder") # the first process has locked it, and has moved damaged checkpoints away
    elif not eval_only:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a", encoding="utf-8") # two runs in one folder would mix their files
        with suppress(ImportError): # Windows has no fcntl: nothing guards the folder there
            import fcntl
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) # until the process ends
            except BlockingIOError:
                raise UserError(f"another train.py writes to {out_dir}: wait, or change --out_dir") from None
    checkpoint = saved_state() if resume else None
    began = read_run() if resume else {}
    earlier = (checkpoint or began).get("config") # run.json has it before the first checkpoint
    if earlier:
        adopt(earlier)
    from_first("folder")
    model_fields = {k: v for k, v in given.items() if k not in DEFAULTS} # those of GPTConfig
    model_fields = earlier["model"] if earlier else without_orphans(model_fields, typed)

# a setting without effect is dropped if a config file gave it, and refused if the command line did
for name, (owner, example) in NEEDS.items():
    owners = {"sparse": sparse, "stream": stream, "init_from": init_from, "wandb": wandb, **model_fields}
    now = owners.get(owner)
    if bool(now) != bool(example) and given.get(name, DEFAULTS[name]) != DEFAULTS[name]:
        if name in typed:
            raise UserError(f"{name}={given[name]} has no effect: you need --{owner}={example}, or drop it")
        print(f"{name}={given[name]} of the config file is dropped: it needs {owner}={example!r}")
        globals()[name] = DEFAULTS[name]
if init_from in ("resume", "scratch"): # as nanoGPT has them
    raise UserError(f"init_from={init_from}: use --resume to go on with a run, or drop --init_from to begin")
if eval_only and not checkpoint and not init_from:
    raise UserError("eval_only needs a trained model\nadd --resume, --resume=FILE.pt or --init_from=...")
parent = None # the model with whose weights a new run starts; a checkpoint of the run has its own
if init_from and not checkpoint:
    with user_errors():
        parent = GPT.from_pretrained(init_from, data_dir)
    own = asdict(parent.config)
    clash = {k: own[k] for k, v in model_fields.items() if k not in MAY_CHANGE and v != own[k]}
    if told := sorted(clash.keys() & typed):
        raise UserError(f"{init_from} has " + ", ".join(f"{k}={own[k]}" for k in told)
                        + f"\ndrop {' '.join(f'--{k}' for k in told)}")
    if clash and not earlier:
        print(f"{init_from} decides: " + ", ".join(f"{k}={v}" for k, v in clash.items()))
    model_fields = own | {k: v for k, v in model_fields.items() if k in MAY_CHANGE}
    print(f"STARTING from {init_from}: {parent.config.attention}, {parent.num_params():,} parameters")
if parent and parent.tokenizer: # the data must be in it
    place = Path(data_dir, "tokenizer_of_init_from.json") if eval_only else folder / "tokenizer.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    other, tokenizer = tokenizer, parent.tokenizer.for_prepare(place, write=not RANK)
    if given.pop("tokenizer", tokenizer) != tokenizer:
        words = f"tokenizer={other} is not that of {init_from}: drop"
        if "tokenizer" in typed:
            raise UserError(f"{words} --tokenizer")
        print(f"{words}ped")
# the default min_lr, or that of a file, was not meant for a lower learning_rate
if min_lr > learning_rate > 0 and "min_lr" not in (typed if "learning_rate" in typed else given):
    print(f"min_lr={min_lr} is above learning_rate={learning_rate}: lowered to {learning_rate / 10}")
    min_lr = learning_rate / 10

for names, fits, words in [
    ("batch_size windows gradient_accumulation_steps eval_interval log_interval",
     lambda v: v >= 1, "at least 1"),
    ("max_iters warmup_iters lr_decay_iters checkpoint_interval keep_checkpoints sample_tokens weight_decay "
     "grad_clip skip_spikes", lambda v: v >= 0, "at least 0"),
    ("eval_iters", lambda v: v >= -1, "at least 0, or -1 for the whole validation split"),
    ("seed", lambda v: 0 <= v < 2**32, "in [0, 2**32)"),
    ("learning_rate", lambda v: v > 0, "above 0"),
    ("min_lr", lambda v: 0 <= v <= learning_rate, f"between 0 and learning_rate={learning_rate}"),
    ("beta1 beta2", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("sampling", ("random", "epochs").__contains__, "random, epochs"),
    ("schedule", ("cosine", "linear", "wsd", "constant").__contains__, "cosine, linear, wsd, constant"),
    ("schedule", lambda v: v == "wsd" or not sparse, f"wsd with sparse={sparse}: add --schedule=wsd"),
    ("dtype", ("auto", "float32", "bfloat16", "float16").__contains__, "auto, float32, bfloat16, float16"),
    ("compile", lambda v: v.lower() in ("auto", "true", "false"), "auto, true, false"),
]:
    for name in names.split():
        if not fits(globals()[name]):
            raise UserError(f"{name}={globals()[name]!r} must be {words}")

trackers = [name for name in ("tensorboard", "wandb") if globals()[name] and not RANK and not eval_only
            and data.package(name, f"--{name}")] # names a missing package before anything is done
rows = batch_size * gradient_accumulation_steps # sequences of a step in all processes
if rows % WORLD:
    fit = WORLD // math.gcd(WORLD, gradient_accumulation_steps) # batch_size must be a multiple of this
    raise UserError(f"{WORLD} processes cannot share out the {rows} sequences of a step equally\n"
                    f"use --batch_size={-(-batch_size // fit) * fit}, or as many processes as divide {rows}")
own_rows = rows // WORLD # sequences of a step in a process
accumulate = own_rows // math.gcd(batch_size, own_rows) # forwards of a process in a step

# --- setup: device and dtype --------------------------------------------------------------------------------

# dense half-precision FLOP/s, from the makers' data sheets; the first name found in the device's name counts
PEAK = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "L40": 181e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "Tesla T4": 65e12}

with user_errors():
    device, device_reason = choose_device(device)
    if WORLD > 1 and device == "cuda": # each process of a machine has its own GPU
        device, _ = choose_device(f"cuda:{LOCAL_RANK}")
        torch.cuda.set_device(device)
    elif WORLD > 1 and device != "cpu":
        raise UserError(f"device={device}: several processes need --device=cpu or --device=cuda")
    use_kernel(kernel)
kind = torch.device(device).type
device_index = [device] * (kind == "cuda") # torch.mps has no number of a device
if dtype == "float16" and kind == "cpu":
    raise UserError("dtype=float16 needs a GPU, for its loss scaler\nuse --dtype=float32 or bfloat16")
if dtype == "auto" and kind == "cuda":
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
elif dtype == "auto":
    dtype = "float32" # a CPU computes the same numbers whether it has bf16 or not
elif dtype == "bfloat16" and kind == "cpu" and not (cpu_has_bf16() or earlier or "dtype" in typed):
    dtype = "float32"
    print("dtype=bfloat16 of the config file is slow on this CPU: float32 is taken instead")
if fsdp and WORLD == 1:
    raise UserError("fsdp shares out a model over processes: start them with torchrun, or drop --fsdp")
# fsdp needs the same layers in all processes, and a choice of weights, a hook or a block needs whole tensors
unfit = {"auto_batch": auto_batch, "sparse": sparse, "depths": model_fields.get("depths"),
         "update_hooks": update_hooks, "forward_hooks": forward_hooks,
         "compile": compile * (compile.lower() == "true"), "dtype": dtype * (dtype == "float16"),
         "optimizer": optimizer * (optimizer == "adam_mini")}
if unfit := [f"--{k}={v}" for k, v in unfit.items() if fsdp and v]:
    raise UserError(f"fsdp does not work with {' '.join(unfit)}\ndrop --fsdp, or that")
autocast = nullcontext() if dtype == "float32" else torch.autocast(kind, getattr(torch, dtype))
scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")
device_name, peak = platform.processor() or platform.machine(), 0
if kind == "cuda":
    device_name = torch.cuda.get_device_name(device)
    peak = next((flops for name, flops in PEAK.items() if name in device_name and dtype != "float32"), 0)
    torch.set_float32_matmul_precision("high") # TF32: 10 bits of mantissa, several times the speed
print(f"device {device} ({device_reason})   dtype {dtype}   "
      f"kernels {path_for(torch.empty(1, device=device), in_c=0)} ({kernel})"
      + (f"   {WORLD} processes, {own_rows} sequences each" if WORLD > 1 else ""))

# --- data ---------------------------------------------------------------------------------------------------


def get_data(name: str) -> data.Dataset:
    """The dataset, prepared if it is not there; offline_dataset, aloud, if it cannot be downloaded."""
    try:
        if stream and name != offline_dataset:
            begin = checkpoint["stream"] if checkpoint else None
            found = data.stream(name, tokenizer, data_dir, val_fraction, begin)
        else:
            place = data.find(name, data_dir) or data.prepare(name, tokenizer, data_dir, val_fraction)
            found = data.load(place, data_dir)
    except data.DownloadError as error:
        if name == offline_dataset or not offline_dataset:
            raise
        print(f"{error}\n\n*** {name.upper()} CANNOT BE DOWNLOADED: TRAINING ON {offline_dataset.upper()} "
              "INSTEAD. ITS LOSSES DO NOT COMPARE. ***\n")
        return get_data(offline_dataset)
    if earlier and found.sha256 != (checkpoint or began).get("data_sha256"):
        raise UserError(f"cannot resume: {found.folder} is not the data this run was trained on\n"
                        "drop --dataset, prepare the data as before, or train anew in another --out_dir")
    if parent and parent.tokenizer and found.meta["tokenizer"] != parent.tokenizer.to_dict():
        text = found.name if found.name in data.DATASETS else shlex.quote(found.meta["source"]["from"])
        raise UserError(f"{found.folder} was prepared with another tokenizer than that of {init_from}: run\n"
                        f"python data.py prepare {text} --tokenizer={tokenizer} --data_dir={data_dir}2\n"
                        f"and add --data_dir={data_dir}2")
    new = {k: v for k, v in given.items() if not earlier or v != earlier["train"].get(k)}
    found.check(new, typed, resuming=bool(earlier))
    return found


asked = earlier["asked"] if earlier else dataset
if RANK:
    dataset, data_dir = from_first("data")
corpus = get_data(dataset)
dataset, data_dir = corpus.name, str(corpus.folder.parent) # what a resumed run must find again
from_first("data", dataset, data_dir)
if WORLD > 1: # now every process has read the files of the earlier run, which the first may move aside below
    dist.all_gather_object(hashes := [""] * WORLD, corpus.sha256)
    if len({*hashes}) > 1:
        raise UserError(f"the processes found different data in {corpus.folder}\nall need the same folder")
codec, prompt_ids = corpus.tokenizer, [] # an empty prompt: no samples
first_id, readable = corpus.train.shards[0][:1].tolist(), codec is not None
try:
    if codec:
        codec.count_bytes(first_id)
except UserError as error: # its file or package is missing; training itself needs only the tokens
    print(f"{error}\nNO SAMPLES WILL BE WRITTEN, AND NO BITS PER BYTE")
    readable = False
if readable and sample_tokens and not RANK and not fsdp: # with fsdp no process computes alone
    prompt_ids = [] if codec.unknown(sample_prompt) else codec.encode(sample_prompt).tolist()
    if not prompt_ids and "sample_prompt" in given:
        raise UserError(f"sample_prompt={sample_prompt!r} is empty, or {dataset} lacks its characters")
    prompt_ids = prompt_ids or first_id # begin as the text begins
amount = "streamed" if isinstance(corpus.train, data.Stream) else f"{len(corpus.train):,}"
print(f"data {dataset}: {amount} training and {len(corpus.val):,} validation tokens, "
      f"vocabulary {corpus.vocab_size:,}")

# --- model and optimizer ------------------------------------------------------------------------------------

for seeding in (torch.manual_seed, random.seed, np.random.seed): # the last two for code that a user may add
    seeding(seed)
with user_errors():
    chosen = {**preset(model_size), "vocab_size": corpus.vocab_size, **model_fields} # later wins
    if not earlier and chosen.get("memory_slots") and codec and codec.eot is not None:
        chosen.setdefault("document_token", codec.eot)
    config = GPTConfig(**chosen)
    sequence = windows * config.block_size # tokens
    if config.vocab_size < corpus.vocab_size:
        way = f"use data of the vocabulary of {init_from}" if init_from else "drop --vocab_size"
        raise UserError(f"vocab_size={config.vocab_size} is below {corpus.vocab_size}: {way}")
    if windows > 1 and max(corpus.train.rows) <= sequence:
        raise UserError(f"windows={windows} are {sequence:,} tokens, more than the text has: lower --windows")
    # refuses a text that is too short; a stream is not opened at its start where the run goes on later
    corpus.train.batch(checkpoint["step"] if checkpoint else 0, rows, sequence, seed)
    corpus.val.batch(0, 1, sequence, seed) if eval_iters > 0 else next(corpus.val.windows(sequence, 1))
    model = GPT(config)
    if parent:
        model.start_from(parent)
        parent = None # frees its memory
    if fsdp: # before the model goes to the device, which may be too small for the whole
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(kind, (WORLD,))
        for part in (*model.blocks, model): # a block is gathered just before it computes
            fully_shard(part, mesh=mesh)
    model = model.to(device)
    opt = build_optimizer(model, optimizer, learning_rate, weight_decay, (beta1, beta2), dtype == "bfloat16")
    decay_from = warmup_iters + int(0.8 * ((lr_decay_iters or max_iters) - warmup_iters)) # of schedule=wsd
    sparsity = Sparse(model, opt, sparse, sparse_density, sparse_interval, (warmup_iters, decay_from),
                      sparse_prune_rate, sparse_boost, sparse_boost_steps) if sparse else None
    hooks = {"forward": find_hooks("forward", forward_hooks), "update": find_hooks("update", update_hooks)}

# Modules that declare `detached` learn beside the model: their gradients are clipped and their losses judged
# apart, so that the model takes the same steps with and without them.
declared, named, zero = declarations(model), dict(model.named_parameters()), torch.zeros((), device=device)
own, beside = ([p for p in declared if declared[p].detached == detached] for detached in (False, True))
losses_beside = {m.loss_name for m in model.modules() if getattr(m, "detached", False)}

tokens_per_step = rows * sequence
flops_per_step = model.flops_per_token() * tokens_per_step / WORLD # of a process


def compiling_pays() -> tuple[float, float]:
    """Estimates, in seconds: what torch.compile saves within the run, and what compiling takes."""
    # On CUDA the host launches about 100 kernels for each layer and micro-batch, and takes 20 us for each.
    saved = {"cuda": 100 * 20e-6 * config.n_layer * accumulate,
             "cpu": 0.2 * flops_per_step / 1e11}.get(kind, 0) # a fifth of a CPU's time, at 1e11 FLOP/s
    return saved * max_iters, 25 if kind == "cuda" else 55


gain, cost = (0, 0) if fsdp else compiling_pays() # auto compiles where it gains twice what it costs
compile_reason = ("never with fsdp" if fsdp else "as asked" if compile != "auto" else
                  f"auto: about {gain:.0f} s to gain, {cost} s to compile")
compile = str(gain > 2 * cost).lower() if compile == "auto" else compile.lower() # a resumed run keeps it
print(f"model {config.attention}: {model.num_params():,} parameters, {tokens_per_step:,} tokens a step, "
      f"{max_iters:,} steps, compile {'on' if compile == 'true' else 'off'} ({compile_reason})")

recent = torch.full((2, 128), math.inf, device=device) # see spike; infinity: a step that was not taken yet
# unwritten: lines of metrics.jsonl that a full disk did not take; micro_batch: most sequences in a forward
# best_step: older checkpoints do not tell it
run = {"run_id": began.get("run_id", os.urandom(16).hex()), "step": 0, "evaluated": -1, "best": math.inf,
       "best_step": "unknown", "skipped": 0, "skipped_in_a_row": 0, "time_s": 0.0, "metrics_bytes": 0,
       "unwritten": "", "micro_batch": (checkpoint or {}).get("micro_batch", batch_size)}
run_config = {"train": {k: globals()[k] for k in DEFAULTS}, "model": asdict(config), "asked": asked}

# --- memory -------------------------------------------------------------------------------------------------


def micro_batch() -> int:
    """Sequences in a forward. It divides the part of a process: the mean of equal parts' means is exact."""
    return math.gcd(run["micro_batch"], own_rows)


class Alive(TorchDispatchMode):
    """Counts the bytes alive of what torch makes, and keeps the most at each kind of operation."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, {} # {address: bytes} of what is alive; {operation: bytes}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for address, storage in self.storages(result).items():
            # what is new is neither a view of an input nor an input that has changed in place
            if address not in self.sizes and address not in self.storages((args, kwargs)):
                self.sizes[address] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, address)
        self.most[operation] = max(self.bytes(), self.most.get(operation, 0))
        return result

    def bytes(self):
        return sum(self.sizes.values())

    @staticmethod
    def storages(tree):
        found = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        return {storage.data_ptr(): storage for storage in found}


def traced(count: int) -> tuple[dict, int]:
    """Forward and backward of `count` sequences: Alive.most, and the bytes kept for the backward."""
    if own_rows == micro_batch(): # else gradients of the micro-batch before lie there
        opt.zero_grad()
    x, y = torch.randint(config.vocab_size, (2, count, sequence), device=device)
    with Alive() as alive:
        with autocast:
            _, losses = model(x, y, with_logits=False)
        loss, kept = sum(losses.values()), alive.bytes()
        loss.backward()
    return alive.most, kept


def forecast() -> str:
    """A line: the memory that training will take, besides that of torch, of its compiler and of the text.

    Activations are extrapolated from 2 and 3 sequences. The optimizer's state is that of a step with a
    learning rate of 0. A CPU's allocator also keeps freed memory: 8 and 29% more were measured.
    """
    states, size = random_states(), micro_batch()
    few, more = min(2, size), min(3, size)
    try:
        _, (most, kept), (most_more, kept_more) = map(traced, (few, few, more)) # the first fills caches
        grads = [p.grad.zero_() for p in declared if p.grad is not None]
        for group in opt.param_groups: # the loop sets it in each step
            group["lr"] = 0.0
        with Alive() as alive:
            opt.step()
        state = alive.bytes()
        spare = max(alive.most.values()) - state # in a step
        params, gradients, masks = (sum(t.nbytes for t in tensors) for tensors in (
            [*model.parameters(), *model.buffers()], grads,
            [*sparsity.masks, *sparsity.means, *sparsity.squares] if sparsity else []))
    finally:
        opt.zero_grad()
        opt.state.clear()
        set_random_states(states)
    # the bytes at a kind of operation are a line in the number of sequences
    busy = max(a + (most_more[name] - a) * (size - few) for name, a in most.items() if name in most_more)
    busy += gradients * (own_rows > size)
    total = params + state + masks + max(busy, gradients + max(spare, gradients * (WORLD > 1)))
    kept += (kept_more - kept) * (size - few)
    mb = [f"{count / 1e6:,.0f}" for count in (params, gradients, state + masks, kept, total)]
    return (f"memory: {mb[0]} MB parameters, {mb[1]} gradients, {mb[2]} optimizer, {mb[3]} activations of "
            f"{size} sequences: at most {mb[4]} MB at a time")


# 7 sequences and an update take 1% of the run
if not (fsdp or eval_only) and max_iters * own_rows >= 100 * (7 + own_rows):
    try:
        print(forecast())
    except (RuntimeError, MemoryError) as error:
        if WORLD > 1 or not out_of_memory(error): # others may wait for this process in a step of Muon
            raise
        print(f"memory: {min(3, micro_batch())} sequences do not fit")
if checkpoint:
    restore(checkpoint)
resumed, checkpoint = checkpoint is not None, None # the second frees its memory
first_step = run["step"] # of this process

# --- what the run writes: checkpoints, metrics.jsonl, lines on stdout, run.json -----------------------------


def save(name: str, keep_previous: bool, **changed) -> bool:
    """Writes a checkpoint; True if that worked. On a full disk the old file stays and the run goes on."""
    settle()
    if RANK:
        if fsdp: # the first process gathers the shares of all
            snapshot()
        return True
    write_lines()
    with suppress(OSError): # a full disk, which is reported below
        os.fsync(metrics.fileno()) # a checkpoint knows of no line that a power cut could take
    run.update(time_s=time.monotonic() - clock, metrics_bytes=os.fstat(metrics.fileno()).st_size)
    try:
        save_checkpoint(folder / name, {**snapshot(), **changed}, keep_previous)
        return True
    except (OSError, RuntimeError) as error: # torch.save reports a full disk as a RuntimeError
        if not folder.is_dir():
            sys.exit(f"error: the folder {out_dir} is gone: stopped at step {run['step']}, nothing is saved")
        free = shutil.disk_usage(folder).free / 1e6
        say(f"WARNING: {folder / name} WAS NOT WRITTEN ({error}). {free:,.0f} MB are free. "
            "The one before is kept; training goes on.")
        return False


def keep_newest() -> None:
    """Gives ckpt.pt the name of its step too, and deletes the oldest such files beyond keep_checkpoints."""
    try:
        link_checkpoint(folder / "ckpt.pt", folder / f"step_{run['step']:06}.pt")
        past = [f for f in kept_checkpoints() if int(f.stem[5:]) <= run["step"]]
        for old in past[:-keep_checkpoints]:
            old.unlink()
    except OSError as error: # a full disk, where a link is a copy
        say(f"WARNING: step {run['step']} has no file of its own ({error}). Training goes on.")


def log(time_s: float, **numbers) -> None:
    """Appends a line to metrics.jsonl. While the disk is full, lines wait in run["unwritten"]."""
    if RANK:
        return
    line = {"step": run["step"], "tokens": run["step"] * tokens_per_step, "time_s": round(time_s, 3)}
    if run["skipped"]:
        line["skipped"] = run["skipped"] # batches so far
    if sparsity:
        line["density"] = round(sparsity.density(), 6) # share of weights that are not held at zero
    line.update(numbers)
    if trackers:
        track(line)
    # JSON has neither NaN nor infinity: they become null
    text = json.dumps(json.loads(json.dumps(line), parse_constant=lambda word: None))
    was_full = bool(run["unwritten"])
    run["unwritten"] += text + "\n"
    error = write_lines()
    if error and not was_full:
        say(f"WARNING: {metrics.name} CANNOT BE WRITTEN ({error}). Lines wait in memory and in checkpoints.")


@cache
def tracker(name: str) -> Callable:
    """The function that hands a line of the log to TensorBoard or Weights & Biases."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder / name, purge_step=first_step + 1) # hides steps that come again
        return lambda line: ([board.add_scalar(k, v, line["step"]) for k, v in line.items()], board.flush())
    found = data.package(name).init( # a branch of a run, in another folder, is a run of its own
        project=wandb_project, name=folder.name, id=checksum([run["run_id"], folder.name])[:16],
        resume="allow", dir=out_dir, config={**run_config["train"], **run_config["model"]},
        settings={"console": "off"})
    found.define_metric("*", step_metric="step") # the package's own count of steps cannot go back
    return found.log


def track(line: dict) -> None:
    """Gives the numbers of a line to --tensorboard and --wandb. The run goes on without one that fails."""
    numbers = {k: v for k, v in line.items() if not isinstance(v, (str, dict))}
    numbers |= {f"{hook}/{k}": v for hook, found in line.get("hooks", {}).items() for k, v in found.items()}
    states = random_states() # what a package draws must not change the run
    for name in [*trackers]:
        try:
            tracker(name)(numbers)
        except Exception as error: # whatever a package raises
            trackers.remove(name)
            say(f"WARNING: {name} FAILED ({type(error).__name__}: {str(error)[:150]}) AND IS LEFT OUT")
    set_random_states(states)


def write_lines() -> OSError | None:
    """Writes what waits to metrics.jsonl, as much as the disk takes; returns what stopped it."""
    try:
        while run["unwritten"]:
            count = metrics.write(run["unwritten"].encode()) # ASCII: a byte is a character
            run["unwritten"] = run["unwritten"][count:]
    except OSError as error:
        return error


on_terminal, shown = sys.stdout.isatty(), 0 # shown: characters of a line that the next words replace


def say(words: str, passing: bool = False) -> None:
    """print, but a closed pipe or a full disk behind stdout does not end the run.

    On a terminal, passing words are cut to one line, and the next words take their place.
    """
    global shown
    passing = passing and on_terminal
    if passing:
        words = words[:shutil.get_terminal_size().columns - 1]
    first, newline, rest = words.partition("\n")
    text = "\r" * bool(shown) + first.ljust(shown) + newline + rest # one write: nothing flickers
    shown = len(words) if passing else 0
    try:
        print(text, end="" if passing else "\n", flush=True)
    except OSError:
        with suppress(OSError): # stderr may be gone too
            print("stdout is gone; the run goes on, metrics.jsonl has all", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # the buffer would fail again at exit


def files_of_run() -> list[Path]:
    """All that a run writes to its folder, of those files that are there."""
    names = "ckpt.pt", "ckpt.prev.pt", "best.pt", "metrics.jsonl", "run.json", "tensorboard", "wandb"
    there = [folder / name for name in names if (folder / name).exists()]
    return there + kept_checkpoints() + [*folder.glob("*.pt.damaged")]


def new_folder() -> Path:
    """previous_N, for files that would be in the way: nothing is deleted."""
    aside = next(d for n in itertools.count(1) if not (d := folder / f"previous_{n}").exists())
    aside.mkdir()
    return aside


def rewind(branch: bool) -> None:
    """Makes the chosen checkpoint ckpt.pt, and its best.pt and metrics.jsonl those of its step.

    What is newer moves aside, as a run that can be resumed there. Whenever the process dies, --resume goes on
    from the old ckpt.pt or from the chosen one, and all is kept.
    """
    newest = folder / "ckpt.pt"
    newer = [f for f in files_of_run() if f.suffix == ".pt" and step_of(f) > run["step"]
             or f == newest and step_of(f) < run["step"]] # ckpt.pt may be older than a chosen best.pt
    if newer:
        aside = new_folder()
        for name in ("metrics.jsonl", "run.json"):
            with suppress(FileNotFoundError):
                shutil.copyfile(folder / name, aside / name)
        for file in newer:
            link_checkpoint(file, aside / file.name)
        print(f"what is newer than step {run['step']} was moved to {aside}")
    if branch:
        with suppress(FileNotFoundError): # a checkpoint may stand in a folder without its run
            shutil.copyfile(origin / "metrics.jsonl", folder / "metrics.jsonl") # cut below
    link_checkpoint(source, newest)
    for file in {*newer} - {newest}:
        file.unlink()
    if branch and step_of(origin / "best.pt") <= run["step"]:
        link_checkpoint(origin / "best.pt", folder / "best.pt")


process = {"command": shlex.join([os.path.basename(sys.executable), *sys.argv]), "git_commit": git_commit(),
           "versions": {"python": platform.python_version(), "torch": torch.__version__,
                        "numpy": np.__version__},
           "device": {"kind": kind, "name": device_name, "dtype": dtype, "processes": WORLD,
                      "threads": torch.get_num_threads()}}
# the hash covers what decides the numbers: the same run in another folder has the same hash
hashed = {**run_config, "train": {k: v for k, v in run_config["train"].items() if k not in LOCAL}}
about = {"run_id": run["run_id"], **{k: began.get(k, v) for k, v in process.items()},
         "config_hash": checksum(hashed)[:16], "config": run_config,
         "hook_list": {k: [name for name, _ in found] for k, found in hooks.items()},
         "dataset": dataset, "data_sha256": corpus.sha256, "seed": seed, "n_params": model.num_params(),
         "resumed": began.get("resumed", []) + [{"step": run["step"], **process}] * resume} # one per resume
if not RANK and not eval_only:
    with user_errors():
        branch = source and not folder.samefile(origin)
        if files_of_run() and (branch or not resumed): # and only now: no slip can follow
            aside = new_folder()
            for file in files_of_run():
                file.replace(aside / file.name)
            print(f"{out_dir} held an earlier run: moved to {aside}")
        if source:
            rewind(branch)
        if not (folder / "best.pt").exists(): # lost, or of the future that --resume=FILE.pt has left
            run["best"] = math.inf
        part = folder / "run.json.part"
        part.write_text(json.dumps({**about, "sha256": checksum(about)}, indent=1), encoding="utf-8")
        part.replace(folder / "run.json")
        metrics = open(folder / "metrics.jsonl", "ab", buffering=0)
    if os.path.getsize(metrics.name) < run["metrics_bytes"]:
        print(f"WARNING: {metrics.name} is shorter than when the checkpoint was saved; "
              "its lines go on from here")
    else:
        metrics.truncate(run["metrics_bytes"]) # later lines will be written again, by the same steps
    track({"step": first_step}) # now, because W&B may ask for a key
run["best"], = from_first("best", run["best"]) # with fsdp all must decide alike whether to save best.pt

# --- helpers of the loop ------------------------------------------------------------------------------------


def lr_at(step: int) -> float:
    """Learning rate of an update, counted from 0: linear warm-up, then the schedule down to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    done = min(1.0, (step - warmup_iters) / max(1, (lr_decay_iters or max_iters) - warmup_iters)) # 0 to 1
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    left = {"cosine": cosine, "linear": 1 - done, "wsd": min(1.0, (1 - done) / 0.2)}[schedule] # 1 to 0
    return min_lr + left * (learning_rate - min_lr)


def smaller(size: int) -> int:
    """The largest divisor of size > 1 that is smaller than size."""
    return max(n for n in range(1, size) if size % n == 0)


def next_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's part of a step's batch, which is a function of (seed, step): x and y, as ids."""
    x, y = corpus.train.batch(step, rows, sequence, seed, epochs=sampling == "epochs") # (rows, sequence)
    x, y = (z.chunk(WORLD)[RANK] for z in (x, y)) # (rows / WORLD, sequence)
    return tuple((z.pin_memory() if kind == "cuda" else z).to(device, non_blocking=True) for z in (x, y))


def split(x: torch.Tensor, y: torch.Tensor) -> list:
    """The micro-batches (x, y) of a process's part."""
    return list(zip(x.split(micro_batch()), y.split(micro_batch())))


def gradient(micro_batches: list) -> dict:
    """Adds up the gradient of all losses over the micro-batches; returns {name: mean loss}, as tensors."""
    means = {}
    for x, y in micro_batches:
        with autocast:
            _, losses = step_model(x, y, with_logits=False)
        scaler.scale(sum(losses.values()) / len(micro_batches)).backward()
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / len(micro_batches)
    return means


def fitting(work: Callable) -> object:
    """work(), which calls the model. With auto_batch it begins again with smaller micro-batches where memory
    runs out, with the same random numbers. Each process does so by itself: work has not sent anything yet.
    """
    while True:
        states = random_states() if auto_batch else None
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if micro_batch() == 1 or not auto_batch or not out_of_memory(error):
                raise
        # The except clause has ended: the traceback, whose frames hold the tensors, is gone.
        was, run["micro_batch"] = micro_batch(), smaller(micro_batch())
        opt.zero_grad()
        set_random_states(states)
        gc.collect()
        if kind == "cuda":
            torch.cuda.empty_cache()
        say(f"step {run['step']}: OUT OF MEMORY with {was} sequences in a forward: from here on "
            f"{micro_batch()}, and {own_rows // micro_batch()} forwards for the same step")


def mean_over_processes(losses: dict) -> dict:
    """Replaces each gradient by its mean over the processes; returns the means of the losses.

    DDP sends while the backward pass runs: 0.66 s a step instead of 0.71 s. But it needs a gradient of all.
    """
    if WORLD == 1:
        return losses
    if fsdp: # which has replaced the gradients
        dist.all_reduce(means := torch.stack([loss.float() for loss in losses.values()]))
        return dict(zip(losses, means / WORLD))
    trained, one = list(declared), torch.ones_like(zero)
    present = torch.stack([zero if p.grad is None else one for p in trained])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    parts = [*grads, present, torch.stack([loss.float() for loss in losses.values()])]
    dist.all_reduce(flat := torch.nn.utils.parameters_to_vector(parts))
    torch.nn.utils.vector_to_parameters(flat.div_(WORLD), parts)
    for p, grad, share in zip(trained, grads, present):
        if p.grad is None and share > 0: # where all processes lack a gradient, the optimizer passes over p
            p.grad = grad
    return dict(zip(losses, parts[-1]))


def draw_from(stream: int) -> None:
    """With several processes, the random numbers that follow are a function of (seed, step, stream)."""
    if WORLD > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, run["step"], stream]).generate_state(1)[0]))


def spike(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(): 1 if loss or norm is more than skip_spikes deviations above the mean of 128 steps: llm.c's rule."""
    now = torch.stack([loss.float(), norm.float()]) # (2,)
    z = (now - recent.mean(1)) / recent.std(1) # NaN, and so no spike, until 128 steps are known
    later = torch.cat([recent[:, 1:], now[:, None]], 1) # with spikes: a lasting change is soon none any more
    recent.copy_(torch.where(now.isfinite().all(), later, recent))
    return (z > skip_spikes).any().float()


# late: a GPU decides itself whether a batch is skipped, and the host reads the numbers of a step when it has
# launched the next one. Not with sparse training: Sparse.finish must know whether the weights have changed.
late = kind in LATE and not sparsity and not fsdp
launched, told = [], {} # (step, names, numbers, event) of steps not read yet; {name: number} of the last read


def send(step: int, **numbers: torch.Tensor) -> None:
    """Sends the numbers of a step to the host. settle reads them."""
    values = torch.stack([n.float() for n in numbers.values()]).to("cpu", non_blocking=late)
    arrived = torch.cuda.current_stream(device).record_event() if kind == "cuda" else None
    launched.append((step, numbers.keys(), values, arrived))


def settle(ahead: int = 0) -> None:
    """Reads the numbers of all launched steps but the last `ahead`. Too many skipped in a row end the run."""
    while len(launched) > ahead:
        step, names, values, arrived = launched.pop(0)
        if arrived:
            arrived.synchronize()
        told.update(zip(names, values.tolist()))
        if not math.isfinite(told["norm_beside"]):
            say(f"step {step}: what learns beside the model has a gradient of norm {told['norm_beside']} "
                "AND SKIPS IT")
        run["skipped_in_a_row"] = run["skipped_in_a_row"] + 1 if told["bad"] else 0
        if told["bad"]:
            run["skipped"] += 1
            say(f"step {step}: loss {told['ce']}, grad norm {told['norm']}: BATCH SKIPPED "
                f"({run['skipped']} so far)")
        if run["skipped_in_a_row"] > MAX_SKIPPED * (4 if dtype == "float16" else 1):
            bad = "spikes or non-finite batches" if skip_spikes else "non-finite batches"
            words = (f"stopped: {run['skipped_in_a_row']} {bad} in a row. Lower --learning_rate "
                     f"or use --dtype=float32; {folder / 'ckpt.pt'} holds the last saved state.")
            sys.exit(1 if RANK else words)


# With eval_iters=0 an evaluation takes at most a sixth of the time of training, because a forward takes a
# third of a step; or 2^17 tokens, so that the split of TinyShakespeare is always whole.
eval_limit = max(2**17, eval_interval * tokens_per_step // 2) if eval_iters == 0 else 0 # 0: no limit
eval_tokens = max(0, eval_iters) * batch_size * sequence or corpus.val.targets(sequence, eval_limit)
bytes_per_token = 0.0 # of UTF-8, in the text of these tokens; the first evaluation counts them


@torch.no_grad()
def evaluate() -> dict | None:
    """val_loss, in nats per token, and val_bits_per_byte of always the same data. None: a signal stops it."""
    global bytes_per_token
    batches = ((corpus.val.batch(i, batch_size, sequence, seed) for i in range(eval_iters)) if eval_iters > 0
               else corpus.val.windows(sequence, batch_size, eval_limit))
    model.eval()
    total, count, size = 0.0, 0, 0.0 if readable else math.nan # nats, tokens, bytes
    start = spoke = time.monotonic()
    while group := [*itertools.islice(batches, WORLD)]: # a batch for each process
        counts = RANK < len(group) # else it takes the last one: with fsdp all must compute equally often
        x, y = group[min(RANK, len(group) - 1)]
        for x, y in zip(*(z.split(len(z) if fsdp else micro_batch()) for z in (x, y))):
            with autocast: # not the compiled model, which would compile again for the last, smaller batches
                _, losses = model(x.to(device), y.to(device), with_logits=False)
            total += losses["ce"].item() * y.numel() * counts
            count += y.numel() * counts
            size += codec.count_bytes(y) * counts if readable and not bytes_per_token else 0
        if caught and not fsdp:
            break
        now = time.monotonic()
        left = (eval_tokens / WORLD / max(count, 1) - 1) * (now - start) # seconds
        if now - spoke > 2 < left and (on_terminal or spoke == start): # a log file gets one line
            say(f"evaluating: {count * WORLD:,} of {eval_tokens:,} tokens, {left:.0f} s left", passing=True)
            spoke = now
    model.train()
    sums = torch.tensor([total, count, size], dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(sums)
    total, count, size = sums.tolist()
    if stop_signal():
        return None
    bytes_per_token = bytes_per_token or size / count or math.nan # NaN: a process cannot read its tokens
    bits = total / count / math.log(2) / bytes_per_token
    return {"val_loss": total / count, **({"val_bits_per_byte": bits} if bytes_per_token > 0 else {})}


def sample_text() -> str:
    """A continuation of sample_prompt. A generator of its own leaves training's random numbers alone."""
    generator = torch.Generator(device).manual_seed(seed)
    with autocast:
        ids = model.generate(torch.tensor([prompt_ids], device=device), sample_tokens, generator=generator)
    return codec.readable(ids[0].tolist())


def verdict(better: bool, val_loss: float, val_bits_per_byte: float = 0.0) -> str:
    """The line of an evaluation: the losses, the change since the last one, the best so far."""
    change = "" if last_loss is None else f" ({val_loss - last_loss:+.4f})"
    bits = f", {val_bits_per_byte:.2f} bits/byte" if val_bits_per_byte else ""
    best = f", best {run['best']:.4f} at step {run['best_step']}" if run["best"] < math.inf else ""
    return f"step {run['step']}: val loss {val_loss:.4f}{change}{bits}{', best' if better else best}"


def time_left(rate: float) -> timedelta:
    """The time until the end of the run, at `rate` steps a second and with the evaluations that are due."""
    evaluations = math.ceil(max_iters / eval_interval) - math.ceil(run["step"] / eval_interval) + 1
    each = eval_s or eval_tokens / (3 * rate * tokens_per_step) # a forward takes a third of a step
    return timedelta(seconds=round((max_iters - run["step"]) / rate + evaluations * each))


caught = [] # signals that asked to stop


def on_signal(number: int, frame: object) -> None:
    """Lets the loop finish its step and save. A second signal ends the process at once."""
    caught.append(number)
    signal.signal(number, signal.SIG_DFL)
    with suppress(OSError): # Ctrl-C ends `| tee` first. print is not safe in a handler
        os.write(1, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode())


def stop_signal() -> int:
    """A signal that any process has caught, or 0. All get one answer, so that they stop at one step. All take
    over the smallest micro-batch, so that the checkpoint of the first process fits each.
    """
    number = caught[0] if caught else 0
    if WORLD > 1:
        dist.all_reduce(both := torch.tensor([number, -run["micro_batch"]]), dist.ReduceOp.MAX)
        number, least = both.abs().tolist()
        if least < run["micro_batch"]:
            say(f"step {run['step']}: another process ran out of memory: {least} sequences in a forward")
        run["micro_batch"] = least
    return number


def memory_hook(error_type: type, error: BaseException, trace: object) -> None:
    """sys.excepthook once the setup is done: where memory runs out, it names the settings that need less."""
    if shown: # a line of the terminal that is not ended
        say("")
    if out_of_memory(error):
        size, ways = micro_batch(), "train anew with a smaller --block_size or model"
        if size > 1 and not auto_batch:
            ways = (f"{'' if fsdp else 'go on with --resume --auto_batch, or '}train anew with "
                    f"--batch_size={smaller(size)} --gradient_accumulation_steps={rows // smaller(size)} "
                    "(the same steps), or with a smaller --block_size or model")
        error_type, error = UserError, UserError(
            f"out of memory at step {run['step']}, with {size} sequences of {sequence:,} tokens in a "
            f"forward; saved checkpoints are kept\n{ways}")
    report_error(error_type, error, trace)


report_error, sys.excepthook = sys.excepthook, memory_hook

# --- the loop -----------------------------------------------------------------------------------------------

last_loss, eval_s, sample = None, 0.0, "" # of the last evaluation; eval_s: its seconds
if eval_only:
    say(verdict(better=False, **fitting(evaluate)))
    if WORLD > 1:
        dist.destroy_process_group()
    sys.exit()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN: # which nohup ignores
    signal.signal(signal.SIGHUP, on_signal)
if resumed and run["step"] >= max_iters:
    say(f"NOTHING TO TRAIN: the run is at step {run['step']:,} and max_iters={max_iters:,}: raise it")
if eval_limit and eval_tokens < (all_tokens := corpus.val.targets(sequence)):
    say(f"each evaluation takes {eval_tokens:,} of {all_tokens:,} validation tokens; all: --eval_iters=-1")
clock = time.monotonic() - run["time_s"] # time of training = time.monotonic() - clock: evaluation moves it
model.train()
step_model = model
if compile == "true":
    try:
        step_model = torch.compile(model)
        with torch.random.fork_rng(): # the trial must not move dropout's generator
            fitting(lambda: gradient(split(*next_batch(run["step"]))[:1]))
    except Exception as error: # whatever the compiler raises, eager mode computes the same
        if out_of_memory(error):
            raise
        step_model, problem = model, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"WARNING: torch.compile FAILED, TRAINING IN EAGER MODE: {problem}")
    opt.zero_grad()
logged_step, logged_time = run["step"], time.monotonic() - clock # of the last line of the log

while True:
    step, stop = run["step"], stop_signal()

    # now and then: the validation loss, a sample, the best model
    if (step % eval_interval == 0 or step >= max_iters) and step != run["evaluated"] and not stop:
        settle()
        paused = time.monotonic()
        measured = fitting(evaluate)
        if measured is None: # a signal: the resumed run will evaluate this step
            continue
        val_loss = measured["val_loss"]
        # a denser model is not what was asked for
        better = val_loss < run["best"] and (not sparsity or sparsity.reached)
        words = verdict(better, **measured)
        if prompt_ids and math.isfinite(val_loss):
            measured["sample_text"] = text = sample_text()
            # repr makes control characters harmless, which could move the cursor
            harmless = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text.strip("\n"))
            sample = "\n    " + harmless.replace("\n", "\n    ")
        say(words + sample * (step < max_iters)) # the summary has the last one
        log(paused - clock, **measured)
        eval_s, last_loss, run["evaluated"] = time.monotonic() - paused, val_loss, step
        clock += eval_s
        if better and (save("best.pt", keep_previous=False, best=val_loss, best_step=step) or fsdp):
            # that of the file: after a full disk the next better model is kept; with fsdp all decide alike
            run.update(best=val_loss, best_step=step)

    # now and then, and at the end: the checkpoint
    if stop and not caught:
        say(f"another process caught {signal.Signals(stop).name}: saving")
    done = stop or step >= max_iters
    if done or (step and step % (checkpoint_interval or eval_interval) == 0):
        saved_ok = save("ckpt.pt", keep_previous=True)
        if saved_ok and keep_checkpoints and not RANK:
            keep_newest()
    if done:
        break

    # the gradient: accumulated, changed by hooks, masked, clipped
    lr = lr_at(step)
    for group in opt.param_groups:
        group["lr"] = lr
    try:
        batch = next_batch(step)
    except UserError: # a stream cannot get its next file: the steps since the last checkpoint stay
        if WORLD == 1:
            save("ckpt.pt", keep_previous=True)
        raise
    if sparsity and sparsity.choose(step):
        say(f"step {step}: {sparsity.active():,} of {sparsity.total:,} weights kept, "
            f"{sparsity.to_grow:,} will grow back")
    draw_from(stream=1 + RANK)
    losses = mean_over_processes(fitting(lambda: gradient(split(*batch))))
    scaler.unscale_(opt)
    draw_from(stream=0)
    noted = run_update_hooks(hooks["update"], step, named)
    if sparsity:
        sparsity.mask_gradients(step)
    norm, norm_beside = (whole(torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)).to(device)
                         if params else zero for params in (own, beside))

    # the update. A batch whose loss or gradient is NaN or infinite is skipped: neither the weights nor the
    # optimizer's moments ever see it. What learns beside the model skips its own bad batches alone. The loss
    # scaler needs no step of its own: where it finds an infinite gradient, the norm is not finite.
    judged = [norm, *(loss for name, loss in losses.items() if name not in losses_beside)]
    bad = 1 - torch.stack(judged).isfinite().all().float() # (): 1 or 0
    if skip_spikes:
        bad = torch.maximum(bad, spike(losses["ce"], norm))
    bad_beside = 1 - (1 - bad) * norm_beside.isfinite()
    step_where_finite(opt, [(own, bad), (beside, bad_beside)], late)
    if sparsity and not bad:
        sparsity.finish(step)
    scaler.update()
    opt.zero_grad()
    run["step"] += 1
    send(step, bad=bad, norm=norm, norm_beside=norm_beside, **losses)
    log_now = run["step"] % log_interval == 0 or run["step"] == max_iters
    settle(ahead=int(late and not log_now))

    # now and then: a line of the log
    time_s = time.monotonic() - clock
    rate = (run["step"] - logged_step) / max(time_s - logged_time, 1e-9) # steps per second
    if run["step"] == first_step + 3 and (left := time_left(rate)) > timedelta(minutes=5):
        say(f"this run takes about {left} hours, evaluations included")
        if kind == "cpu" and not model_fields and not model_size: # a bare `python train.py`
            say("a small one takes two minutes: python train.py config/train_shakespeare_diffmla.py")
    if log_now or run["step"] == first_step + 1: # the first step is slower than all others
        logged_step, logged_time = run["step"], time_s
    if log_now:
        if hooks["forward"]:
            with autocast:
                noted.update(watch(model, hooks["forward"], *split(*batch)[0]))
        seen = {hook: {k: float(v) for k, v in result.items()} for hook, result in noted.items()}
        losses, tokens_per_s = {name: told[name] for name in losses}, rate * tokens_per_step
        loss, norm = losses.pop("ce"), told["norm"]
        log(time_s, train_loss=loss, **losses, lr=lr, grad_norm=norm, tokens_per_s=round(tokens_per_s),
            **({"hooks": seen} if seen else {}))
        mfu = f"  MFU {flops_per_step * rate / peak:.1%}" if peak else ""
        left, more = time_left(rate), f"  lr {lr:.2e}  grad {norm:.2f}" * (not on_terminal)
        left = left if on_terminal else f"{left.total_seconds():,.0f} s"
        say(f"step {run['step']:>6}/{max_iters}  loss {loss:.4f}{more}  {tokens_per_s:,.0f} tokens/s{mfu}  "
            f"{left} left", passing=True)

found_best, place = run["best"] < math.inf, shlex.quote(out_dir)
if sample:
    say(f"a sample:{sample}")
say(f"step {run['step']}" + f", best val loss {run['best']:.4f} at step {run['best_step']}" * found_best
    + (f", last {last_loss:.4f}" if last_loss is not None else "")
    + (f", {run['skipped']} batches skipped" if run["skipped"] else "")
    + (", THE LAST LINES OF metrics.jsonl NOT WRITTEN" if run["unwritten"] else ""))
say(f"{run['time_s']:.1f} s of training, {time.monotonic() - STARTED:.1f} s in all; "
    f"{'saved' if saved_ok else 'NOT SAVED'} in {out_dir}: metrics.jsonl, ckpt.pt{', best.pt' * found_best}")
if run["step"] < max_iters:
    say(f"to go on: {'python' if WORLD == 1 else 'torchrun ...'} train.py --out_dir={place} --resume")
say(f"next: python sample.py --out_dir={place}")
stop = stop_signal() # which also waits for the first process to save
if WORLD > 1:
    dist.destroy_process_group()
sys.exit(1 if not saved_ok else 128 + stop if stop else 0)
