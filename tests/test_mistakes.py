"""Ordinary slips, each through the real command: exit code 2, at most three lines on stderr, and in them the
way out.
"""
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data import prepare
from model import save_checkpoint
from processes import ROOT, run

fcntl = pytest.importorskip("fcntl") # Windows has none, and its runs no lock

PLAY = ("--dataset=play --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=2 "
        "--sample_tokens=4").split()
NOTHING_THERE = {"DATA_MIRROR": None, "HTTPS_PROXY": "http://nowhere.invalid",
                 "HTTP_PROXY": "http://nowhere.invalid", "CUDA_VISIBLE_DEVICES": ""} # no network, no GPU

# command line, what the message must hold. {d} is the folder that `world` fills.
SLIPS = {
    "misspelt setting": ("train.py --learning_rat=1e-3", "learning_rate"),
    "misspelt setting in a file": ("train.py {d}/typo.py", "learning_rate"),
    "word for a number": ("train.py --n_layer=two", "must be an int"),
    "number with a fraction": ("train.py --batch_size=1.5", "must be an int"),
    "wrong type in a file": ("train.py {d}/type.py", "must be an int"),
    "no such config": ("train.py config/train_shakespeare_diffmlaa.py", "train_shakespeare_diffmla.py"),
    "config with a syntax error": ("train.py {d}/syntax.py", "SyntaxError"),
    "config that raises": ("train.py {d}/raises.py", "ZeroDivisionError"),
    "one dash": ("train.py -n_layer=2", "two dashes"),
    "no value": ("train.py --n_layer", "needs a value"),
    "setting without dashes": ("train.py n_layer=2", "--n_layer=2"),
    "script for a config": ("train.py model.py", "model.py is a program"),
    "model of a run that is not there": ("model.py --out_dir={d}/nowhere", "drop --out_dir"),
    "unknown dataset": ("train.py --dataset=shakespear", "shakespeare"),
    "empty text": ("train.py --dataset={d}/empty.txt", "is empty"),
    "text shorter than block_size": ("train.py --dataset={d}/short.txt", "lower --block_size"),
    "text that is no UTF-8": ("train.py --dataset={d}/latin.txt", "iconv"),
    "folder without text": ("train.py --dataset={d}/nothing", "no text files"),
    "no network and no fallback": ("train.py --dataset=shakespeare --data_dir={d}/offline", "DATA_MIRROR"),
    "unknown tokenizer": ("train.py --dataset={d}/play.txt --data_dir={d}/new --tokenizer=bert",
                          "char, ascii, gpt2, byte"),
    "another tokenizer than the data's": ("train.py --tokenizer=byte",
                                          "play.txt --tokenizer=byte --data_dir="),
    "another tokenizer file than the data's": ("train.py --tokenizer={d}/saved.json",
                                               "was prepared with tokenizer=char"),
    "another validation share than the data's": ("train.py --val_fraction=0.3",
                                                 "--val_fraction=0.3 --data_dir="),
    "truncated shard": ("train.py --dataset=cut", "prepare the dataset again"),
    "more than any memory holds": ("train.py --attention=mla --kv_rank=10000000000", "Make the model"),
    "whole split misspelt": ("train.py --eval_iters=-2", "-1 for the whole validation split"),
    "width not divisible": ("train.py --n_embd=15 --n_head=2", "not divisible by n_head=2"),
    "unknown attention": ("train.py --attention=flash", "mha, mla, diff, diff_mla"),
    "unknown activation": ("train.py --activation=swish", "gelu, relu2, silu, telu, crrelu"),
    "knob without its owner": ("train.py --kv_rank=8", "needs attention=mla"),
    "dropout of 150%": ("train.py --dropout=1.5", "[0, 1)"),
    "vocabulary too small": ("train.py --vocab_size=3", "drop --vocab_size"),
    "no GPU there": ("train.py --device=cuda", "--device=auto"),
    "no such device": ("train.py --device=abacus", "--device=auto"),
    "unknown dtype": ("train.py --dtype=fp16", "float32, bfloat16, float16"),
    "fp16 on a CPU": ("train.py --dtype=float16 --device=cpu", "bfloat16"),
    "unknown compile": ("train.py --compile=maybe", "auto, true, false"),
    "unknown kernel": ("train.py --kernel=cuda", "auto, triton, torch"),
    "Triton without a GPU": ("train.py --kernel=triton --device=cpu", "kernel=auto"),
    "unknown schedule": ("train.py --schedule=step", "cosine, linear, wsd, constant"),
    "unknown optimizer": ("train.py --optimizer=sgdd", "adamw"),
    "unknown sparse rule": ("train.py --sparse=random --schedule=wsd", "skeleton_flesh, magnitude"),
    "sparse without a constant phase": ("train.py --sparse=magnitude", "--schedule=wsd"),
    "sparse without time for it": (
        "train.py --sparse=magnitude --schedule=wsd --max_iters=200 --warmup_iters=10",
        "--sparse_interval=15 or less"),
    "sparse knob without its owner": ("train.py --sparse_density=0.5", "need --sparse=skeleton_flesh"),
    "unknown hook": ("train.py --update_hooks=identiti", "identity, clip_by_layer, gradient_noise"),
    "hook in no file": ("train.py --forward_hooks=mine.py:stats", "there is no file 'mine.py'"),
    "hook that is not in its file": ("train.py --update_hooks={d}/typo.py:f", "no update hook 'f'"),
    "word for a hook's number": ("train.py --update_hooks=clip_by_layer=much", "must be a number"),
    "no batch": ("train.py --batch_size=0", "at least 1"),
    "negative learning rate": ("train.py --learning_rate=-1", "above 0"),
    "negative seed": ("train.py --seed=-1", "[0, 2**32)"),
    "unknown character in sample_prompt": ("train.py --sample_prompt=Ж", "sample_prompt"),
    "out_dir below a file": ("train.py --out_dir={d}/play.txt/out", "play.txt"),
    "out_dir is a file": ("train.py --out_dir={d}/play.txt", "play.txt"),
    "resume without a run": ("train.py --resume --out_dir={d}/nowhere", "drop --resume"),
    "resume another model": ("train.py --resume --out_dir={d}/run --n_layer=3", "n_layer was 1, now 3"),
    "resume another seed": ("train.py --resume --out_dir={d}/run --seed=5", "seed was 1337, now 5"),
    "resume on other data": ("train.py --resume --out_dir={d}/run --dataset=other", "--init_from={d}/run"),
    "resume from nothing whole": ("train.py --resume --out_dir={d}/broken", "start again without --resume"),
    "resume from a file that is not there": ("train.py --resume={d}/nowhere/ckpt.pt", "ckpt.pt: No such"),
    "resume from a file of another step": ("train.py --resume={d}/run/step_000001.pt", "/run/ckpt.pt"),
    "resume from a folder": ("train.py --resume={d}/run", "give a file in it"),
    "resume from code": ("train.py --resume={d}/bomb/ckpt.pt", "may run code; use another checkpoint"),
    "sample from code": ("sample.py --out_dir={d}/bomb", "may run code; use another checkpoint"),
    "two runs in one folder": ("train.py --out_dir={d}/locked", "another train.py"),
    "sample before training": ("sample.py --out_dir={d}/nowhere", "train first"),
    "unknown characters in a prompt": ("sample.py --out_dir={d}/run --start=Жar", "'Ж'"),
    "empty prompt": ("sample.py --out_dir={d}/run --start=", "the prompt is empty"),
    "prompt file not there": ("sample.py --out_dir={d}/run --start=FILE:{d}/none.txt", "none.txt"),
    "negative temperature": ("sample.py --out_dir={d}/run --temperature=-1", "0 is greedy"),
    "top_p of 2": ("sample.py --out_dir={d}/run --top_p=2", "(0, 1]"),
    "no samples": ("sample.py --out_dir={d}/run --num_samples=0", "at least 1"),
    "foreign checkpoint": ("sample.py --out_dir={d}/foreign", "train again"),
    "sample without the GPU": ("sample.py --out_dir={d}/run --device=cuda", "--device=auto"),
    "bench without the GPU": ("bench.py kv_cache --device=cuda", "--device=auto"),
    "validation split too short for eval_iters": (
        "train.py --dataset={d}/cut.txt --data_dir={d}/new2 --val_fraction=0.005 --eval_iters=3",
        "raise --val_fraction"),
    "no command": ("data.py", "prepare SOURCE"),
    "misspelt command": ("data.py prepar shakespeare", "prepare"),
    "verify what is not there": ("data.py verify nowhere", "prepare"),
    "verify what is damaged": ("data.py verify cut", "prepare the dataset again"),
    "line that is no JSON": ("data.py prepare {d}/bad.jsonl", "line 2 is not JSON"),
    "validation share of 2": ("data.py prepare {d}/play.txt --val_fraction=2", "val_fraction=2"),
    "no such size": ("train.py --model_size=meduim", "Nearest: medium"),
    "another size on resume": ("train.py --out_dir={d}/run --resume --model_size=nano",
                               "model_size was '', now 'nano'"),
    "windows that nothing connects": ("train.py --windows=2", "--memory_slots=16"),
    "order of a stream": ("train.py --dataset={d}/play.txt --stream --tokenizer=byte --sampling=epochs",
                          "--stream=False"),
    "depths of another model": ("train.py --depths=2,5", "n_layer=1"),
    "decoding of no kind": ("sample.py --out_dir={d}/run --decode=fast", "auto, eager, graph, compiled"),
    "drafts of nobody": ("sample.py --out_dir={d}/run --speculative --draft=early", "auto, ahead, ngram"),
    "drafts that nobody asked for": ("sample.py --out_dir={d}/run --draft=ngram", "--speculative"),
    "more windows than text": ("train.py --memory_slots=2 --windows=900", "lower --windows"),
    "cache without a run": ("bench.py cache --out_dir={d}/nowhere", "config/train_shakespeare_diffmla.py"),
    "recall of another text": ("bench.py eval {d}/run recall", "config/train_recall.py"),
    "needles in no haystack": ("bench.py eval {d}/run needles", "config/train_needles.py"),
    "model without heads": ("model.py --n_head=0", "at least 1"),
    "unknown suite": ("bench.py speed", "train, decode, kv_cache"),
    "ablation of nothing": ("bench.py ablate", "bench.py ablate config/train_shakespeare_diffmla.py"),
    "ablation of no such config": ("bench.py ablate config/train_recal.py", "config/train_recall.py"),
    "arms in no file": ("bench.py ablate config/slm_char.py --arms={d}/nowhere.py", "no config file"),
    "file without arms": ("bench.py ablate config/slm_char.py --arms={d}/type.py", "ARMS = {"),
    "arms without a name": ("bench.py ablate config/slm_char.py --arms=--glu", "mla: --attention=mla"),
    "arm against no arm": ("bench.py ablate config/slm_char.py --arms={d}/arms.py", "there is: a"),
    "arm with an unknown flag": ("bench.py ablate config/slm_char.py --arms=a:--glue", "glu"),
    "arms of one folder": (
        "bench.py ablate config/slm_char.py --arms=a,b:--glu;a.b:--bias=false", "other names"),
    "more seeds than degrees of freedom": ("bench.py ablate config/slm_char.py --seeds=32", "1 to 31"),
    "comparison with no run": ("bench.py compare {d}/nowhere", "python train.py --out_dir="),
    "unknown axis": ("bench.py compare {d}/run --x=hours", "seconds, steps, tokens"),
    "table without results": ("bench.py table --results=nowhere.json", "bench.py ablate config/"),
    "resume on data that is not prepared": ( # refused before it is prepared
        "train.py --resume --out_dir={d}/run --dataset={d}/other.txt --data_dir={d}/new4",
        "trained on, play"),
    "another tokenizer on resume": (
        "train.py --resume --out_dir={d}/run --dataset={d}/data/play --tokenizer=byte --val_fraction=0.5",
        "not --tokenizer=byte --val_fraction=0.5\ndrop that, or train anew"),
    "prepared folder by its path": (
        "train.py --dataset={d}/data/play/ --tokenizer=byte --data_dir={d}/new3", "with tokenizer=char"),
    "data_dir that is a dataset": (
        "train.py --dataset=recall --data_dir={d}/data/play", "did you mean --dataset="),

    # what other programs call it
    "nanoGPT's constant rate": ("train.py --decay_lr=False", "Nearest: schedule."),
    "nanoGPT's checkpoints": ("train.py --always_save_checkpoint=False", "Nearest: checkpoint_interval."),
    "nanoGPT's backend": ("train.py --backend=nccl", "Nearest: device."),
    "nanoGPT's way to sample": ("sample.py --init_from=resume", "Nearest: out_dir."),
    "nanoGPT's compile when sampling": ("sample.py --out_dir={d}/run --compile=False", "Nearest: decode."),
    "nanoGPT's way to go on": ("train.py --init_from=resume", "--resume"),
    "nanoGPT's way to begin": ("train.py --init_from=scratch", "drop --init_from"),
    "nanoGPT's log": ("train.py --wandb_log=True", "Nearest: wandb."),
    "nanoGPT's name of a log": ("train.py --wandb_run_name=gpt2", "Nearest: wandb."),
    "project of no log": ("train.py --wandb_project=owt", "you need --wandb=True"),
    "evaluation of no model": ("train.py --eval_only", "add --resume, --resume=FILE.pt or --init_from="),
    "evaluation by another name": ("train.py --evaluate", "Nearest: eval_only."),
    "weights of no file": ("train.py --init_from={d}/none.pt", "give a folder, a .pt file, or one of gpt2"),
    "weights of a folder without any": ("train.py --init_from={d}/nothing", "there is no checkpoint in"),
    "weights of a text": ("train.py --init_from={d}/play.txt", "use another checkpoint"),
    "weights to sample from": ("sample.py --init_from=gpt2", "Nearest: out_dir."),
    "epochs": ("train.py --epochs=3", "Nearest: max_iters."),
    "steps": ("train.py --steps=100", "Nearest: max_iters."),
    "context": ("train.py --context=128", "Nearest: block_size."),
    "width": ("train.py --hidden_size=128", "Nearest: n_embd."),
    "heads": ("train.py --n_heads=4", "Nearest: n_head."),
    "heads of keys": ("train.py --num_kv_heads=2", "Nearest: n_kv_head."),
    "grouped queries": ("train.py --gqa=2", "Nearest: n_kv_head."),
    "a gated activation as a switch": ("train.py --swiglu", "Nearest: activation, glu."),
    "a gated activation by its name": ("train.py --activation=swiglu", "gelu, relu2, silu"),
    "attention as a switch": ("train.py --mla", "Nearest: attention."),
    "residual streams as a switch": ("train.py --use_mhc", "Nearest: residual."),
    "rope as a switch": ("train.py --use_rope=True", "Nearest: position."),
    "rope by another name": ("train.py --position=rotary", "learned, rope, none"),
    "norm by another name": ("train.py --norm=rms", "layernorm, rmsnorm"),
    "lr": ("train.py --lr=1e-3", "Nearest: learning_rate."),
    "temp": ("sample.py --out_dir={d}/run --temp=0.8", "Nearest: temperature."),
    "prompt": ("sample.py --out_dir={d}/run --prompt=hi", "Nearest: start."),
    "length of a sample": ("sample.py --out_dir={d}/run --max_length=5", "Nearest: max_new_tokens."),
    "topk": ("sample.py --out_dir={d}/run --topk=5", "Nearest: top_k,"),
    "top-K": ("sample.py --out_dir={d}/run --top-K=5", "Nearest: top_k,"),
    "top.k": ("sample.py --out_dir={d}/run --top.k=5", "Nearest: top_k,"),
    "size of a model": ("model.py --size=nano", "model_size"),
    "British optimizer": ("optim.py --optimiser=adamw", "Nearest: optimizer,"),
    "British tokenizer": ("data.py prepare {d}/play.txt --tokeniser=byte", "Nearest: tokenizer,"),

    # files and datasets of nanoGPT; a path in the place of another
    "nanoGPT's config of characters": (
        "train.py config/train_shakespeare_char.py", "train_shakespeare_mha.py"),
    "nanoGPT's config of GPT-2": ("train.py config/train_gpt2.py", "config/gpt2_124m_fineweb.py"),
    "nanoGPT's config of an evaluation": ("train.py config/eval_gpt2.py", "--eval_only --init_from=gpt2"),
    "nanoGPT's config of a larger evaluation": (
        "train.py config/eval_gpt2_xl.py", "--eval_only --init_from=gpt2-xl"),
    "a config misspelt": ("train.py config/finetune_shakespear.py", "finetune_shakespeare.py"),
    "nanoGPT's web text": ("train.py --dataset=openwebtext", "tinystories, c4, fineweb"),
    "nanoGPT's characters": ("train.py --dataset=shakespeare_char", "nearest: shakespeare"),
    "a dataset of nobody": ("train.py --dataset=enwik8", "known: shakespeare, pystdlib"),
    "nanoGPT's prepare.py as a config": (
        "train.py data/openwebtext/prepare.py", "python data.py prepare NAME"),
    "nanoGPT's prepare.py as a text": (
        "data.py prepare data/shakespeare_char/prepare.py", "known: shakespeare"),
    "nanoGPT's prepare.py as a command": ("data.py data/shakespeare_char/prepare.py", "prepare SOURCE"),
    "a checkpoint for a folder": ("train.py --out_dir={d}/run/ckpt.pt", "name a folder"),
    "a checkpoint for a folder to resume": (
        "train.py --resume --out_dir={d}/run/ckpt.pt", "name a folder instead"),
    "a checkpoint for the folder of a model": ("model.py --out_dir={d}/run/best.pt", "the folder of a run"),
    "a checkpoint for a config": ("sample.py {d}/run/ckpt.pt", "Did you mean --out_dir={d}/run/ckpt.pt?"),
    "a checkpoint for a config to train": (
        "train.py {d}/run/ckpt.pt", "Did you mean --resume={d}/run/ckpt.pt?"),
    "a checkpoint for a text": ("data.py prepare {d}/run/ckpt.pt", "not text"),
    "a checkpoint that is not there": ("sample.py --out_dir={d}/run/none.pt", "train first"),
    "a text for a checkpoint": ("sample.py --out_dir={d}/play.txt", "give its ckpt.pt"),
    "a text for a config": ("train.py {d}/play.txt", "Did you mean --dataset={d}/play.txt?"),
    "a run for a config": ("sample.py {d}/run", "Did you mean --out_dir={d}/run?"),
    "a run for a config of its model": ("model.py {d}/run", "Did you mean --out_dir={d}/run?"),
    "a dataset for a config": ("train.py {d}/data/play", "Did you mean --dataset={d}/data/play?"),
    "a name without the folder": ("train.py train_shakespeare_mha", "config/train_shakespeare_mha.py"),

    # how it is typed
    "settings before the command": ("data.py --tokenizer=byte prepare {d}/play.txt", "then settings"),
    "two texts": ("data.py prepare {d}/play.txt {d}/other.txt", "prepare SOURCE"),
    "no text": ("data.py prepare", "prepare SOURCE"),
    "another command": ("data.py download shakespeare", "no command 'download'"),
    "misspelt suite": ("bench.py kvcache", "decode, kv_cache"),
    "upper case": ("train.py --N_LAYER=2", "Nearest: n_layer,"),
    "a capital": ("train.py --Learning_Rate=1e-3", "Nearest: learning_rate,"),
    "upper case of a choice": ("train.py --attention=MLA", "mha, mla, diff, diff_mla"),
    "upper case of a type": ("train.py --dtype=BF16", "float32, bfloat16, float16"),
    "half": ("train.py --dtype=half", "float32, bfloat16, float16"),
    "capitals of an optimizer": ("train.py --optimizer=AdamW", "adamw, fadam"),
    "upper case of a device": ("train.py --device=CPU", "or cpu"),
    "a capital of a schedule": ("train.py --schedule=Cosine", "cosine, linear"),
    "a long dash": ("train.py \N{EM DASH}n_layer=2", "as in --n_layer=2"),
    "a middle dash": ("train.py \N{EN DASH}n_layer=2", "as in --n_layer=2"),
    "three dashes": ("train.py ---n_layer=2", "Nearest: n_layer,"),
    "a colon": ("train.py --n_layer:2", "Nearest: n_layer,"),
    "spaces around the =": ("train.py --n_layer = 2", "no space stands beside the =, as in --n_layer=6"),
    "spaces around the = of a switch": ("train.py --bias = true", "no space stands beside the ="),
    "a space before the =": ("train.py --n_layer =2", "no space stands beside the ="),
    "a space behind the =": ("train.py --n_layer= 2", "no space stands beside the ="),
    "no dashes but spaces": ("train.py n_layer = 2", "two dashes: --n_layer"),
    "quotes inside": ('train.py --n_layer="2"', "must be an int"),
    "a comma in an int": ("train.py --max_iters=1,000", "an int, as in 1000"),
    "a comma in a float": ("train.py --learning_rate=0,001", "must be a float"),
    "a small float for an int": ("train.py --max_iters=1e-3", "an int, as in 1000 or 1e3"),
    "a unit": ("train.py --block_size=1k", "an int, as in 1000 or 1e3"),
    "a percentage": ("train.py --val_fraction=10%", "The default is 0.1"),
    "maybe": ("train.py --bias=maybe", "must be true or false"),
    "another language's yes": ("train.py --bias=oui", "must be true or false"),
    "nothing behind the =": ("train.py --n_layer=", "must be an int"),
    "no value of a float": ("train.py --dropout", "as in --dropout=0.0"),

    # values that nothing can be made of
    "no steps": ("train.py --max_iters=-1", "at least 0"),
    "no interval": ("train.py --eval_interval=-5", "at least 1"),
    "heads that do not divide": ("train.py --n_kv_head=3", "choose a divisor"),
    "no tokens": ("sample.py --out_dir={d}/run --max_new_tokens=-5", "at least 1"),
    "negative top_k": ("sample.py --out_dir={d}/run --top_k=-1", "0 keeps every token"),
    "OpenAI's other vocabulary": (
        "data.py prepare {d}/play.txt --tokenizer=cl100k_base", "char, ascii, gpt2"),
    "vocabulary below the bytes": ("data.py tokenizer {d}/play.txt --vocab_size=100", "at least 257"),
    "negative max_tokens": ("data.py prepare {d}/play.txt --max_tokens=-1", "at least 0"),
}


TEXTS = {"play.txt": "to be or not to be, that is the question\n" * 60,
         "cut.txt": "all the world is a stage\n" * 60,
         "other.txt": "neither a borrower nor a lender be\n" * 60, "short.txt": "abcdefgh", "empty.txt": "",
         "bad.jsonl": '{"text": "a"}\nno\n', "saved.json": '{"name": "char", "char_to_id": {"a": 0, "b": 1}}',
         "typo.py": "learning_rat = 1e-3", "type.py": "n_layer = 'two'", "syntax.py": "n_layer = = 2",
         "raises.py": "n_layer = 1 // 0", "arms.py": "ARMS = {'a': {'flags': '', 'against': 'b'}}"}


class Bomb:
    def __reduce__(self):
        return print, ("this code ran",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what slips are made of: texts, configs, a finished run, a damaged one, and one that is
    locked.
    """
    d = tmp_path_factory.mktemp("world")
    for name, text in TEXTS.items():
        (d / name).write_text(text, encoding="utf-8")
    (d / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 50)
    for folder in ("nothing", "foreign", "broken", "locked", "bomb"):
        (d / folder).mkdir()
    torch.save({"model": {}, "iter_num": 5}, d / "foreign/ckpt.pt")
    (d / "broken/ckpt.pt").write_bytes(b"not a checkpoint at all")
    save_checkpoint(d / "bomb/ckpt.pt", {"model": Bomb()}) # with a good seal
    for name in ("play", "other", "cut"):
        prepare(d / f"{name}.txt", data_dir=d / "data")
    shard = d / "data/cut/train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    done = run([ROOT / "train.py", *PLAY, f"--out_dir={d / 'run'}", f"--data_dir={d / 'data'}"])
    assert done.returncode == 0, done.stderr
    with open(d / "locked/lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield d


# Imports once what all scripts import, and forks for each command, which then costs a tenth of a process of
# its own. Reads a list of commands, writes a list of (exit code, stdout, stderr).
FORKS = """import json, os, sys, tempfile
sys.path.append("tests")
import bench, data, model, optim, sample
from processes import exit_code

answers = []
for argv in json.load(sys.stdin):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.append([code] + [(file.seek(0), file.read().decode())[1] for file in (out, err)])
        continue
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.argv = argv
    code = exit_code(argv[0])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)
json.dump(answers, sys.stdout)
"""


def command(line, world, folder):
    """The arguments of a slip, with the usual flags that it does not give itself."""
    script, *args = line.format(d=world).split(" ")
    usual = {"train.py": [f"--data_dir={world / 'data'}"],
             "data.py": [f"--data_dir={world / 'data'}"] * bool(args)}.get(script, [])
    if script == "train.py" and "--resume" not in line:
        usual += [f"--out_dir={folder}", *PLAY]
    given = {arg.split("=")[0] for arg in args}
    return [str(ROOT / script), *args, *(arg for arg in usual if arg.split("=")[0] not in given)]


@pytest.fixture(scope="module")
def outcomes(request, world, tmp_path_factory):
    """{name of a slip that is tested: (exit code, stdout, stderr)}. Two processes share the commands."""
    chosen = {item.callspec.id for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")}
    # Two commands that resume world's run at once would see the other's lock on its folder.
    halves = [], []
    for number, name in enumerate(name for name in SLIPS if name in chosen):
        halves["--resume" not in SLIPS[name][0] and number % 2].append(name)
    asked = [[command(SLIPS[name][0], world, tmp_path_factory.mktemp("slip") / "out") for name in half]
             for half in halves]
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(lambda half: run(["-c", FORKS], json.dumps(half), env=NOTHING_THERE), asked)]
    assert not any(half.returncode for half in done), done
    answers = [answer for half in done for answer in json.loads(half.stdout)]
    return dict(zip([*halves[0], *halves[1]], answers))


@pytest.mark.parametrize("line, way_out", SLIPS.values(), ids=SLIPS)
def test_a_slip_ends_with_the_way_out(line, way_out, world, outcomes, request):
    code, out, err = outcomes[request.node.callspec.id]
    assert code == 2, out + err
    message = [said for said in err.strip().splitlines() if not said.startswith(("settings:", " " * 10))]
    assert message[0].startswith("error: ") and len(message) <= 3, err
    assert way_out.replace("{d}", str(world)) in err, err
    assert "this code ran" not in out


@pytest.mark.parametrize("name", ["misspelt setting", "unknown characters in a prompt", "misspelt suite",
                                  "no such size", "misspelt command", "British optimizer"])
def test_a_command_of_its_own_says_the_same(name, world, outcomes, tmp_path):
    """A slip of each script, not from FORKS."""
    line, way_out = SLIPS[name]
    done = run(command(line, world, tmp_path), env=NOTHING_THERE)
    assert done.returncode == 2 and done.stderr.splitlines()[-2:] == outcomes[name][2].splitlines()[-2:]


def test_nothing_is_lost(world):
    """After all those slips the finished run is as it was."""
    assert json.loads((world / "run/run.json").read_text(encoding="utf-8"))["seed"] == 1337
    assert (world / "run/ckpt.pt").exists() and not (world / "run/previous_1").exists()
    assert not (world / "nowhere").exists()
