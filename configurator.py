"""Settings from config files and the command line, checked. Read configure, parse and load_file first.

A script has its settings at its top, as in `learning_rate = 1e-3 # peak rate`. Such a line declares one:
name, default, type (the default's) and text in --help (the comment). Below the settings the script calls
`given = configure(globals(), GPTConfig)`. Arguments count in the order written, and later wins:

    python train.py config/small.py --learning_rate=3e-4 --compile --no-bias
"""
import os
import signal
import sys
from pathlib import Path

# torch's threads spin 300,000 times for work before they sleep. Two runs of two threads on two cores then
# hinder each other more than they compute. torch reads this variable when it is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def stop_at_once(*_):
    """Ctrl-C while torch is imported: an exception would be fifty lines, and some imports swallow it."""
    os.write(2, b"stopped\n")
    os._exit(130) # 128 + SIGINT's number 2: a shell's code for Ctrl-C


# Only where Ctrl-C is not ignored, and in a script that calls configure: that makes it an exception again.
_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "") # a notebook has none
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _script.is_file():
    if b"configure(globals()" in _script.read_bytes():
        signal.signal(signal.SIGINT, stop_at_once)

import ast
import dataclasses
import difflib
import errno
import inspect
import json
import re
import runpy
import subprocess
import textwrap
import traceback
from contextlib import contextmanager, suppress

# Type of a setting -> what a message calls it. A script's values of other types are no settings.
KIND = {bool: "true or false", int: "an int, as in 1000 or 1e3", float: "a float, not nan", str: "a str",
        tuple: "a tuple, as in (2, 4, 8)"}
WORDS = {"true": True, "1": True, "yes": True, "on": True,
         "false": False, "0": False, "no": False, "off": False}

# Setting -> names that other programs have for it, without use_; suggested where the script has the setting.
SYNONYMS = {
    "learning_rate": "lr max_lr peak_lr", "weight_decay": "wd", "beta1": "betas", "beta2": "betas",
    "grad_clip": "clip max_grad_norm clip_grad_norm", "warmup_iters": "warmup warmup_steps num_warmup_steps",
    "schedule": "decay_lr lr_schedule lr_scheduler scheduler", "optimizer": "optim adam",
    "max_iters": "epochs n_epochs num_epochs iters num_iters steps n_steps num_steps max_steps train_steps",
    "batch_size": "bs micro_batch_size", "gradient_accumulation_steps": "grad_accum grad_accum_steps",
    "block_size": "seq_len seq_length sequence_length context context_length ctx n_ctx max_seq_len",
    "n_embd": "d_model dim n_embed embed_dim hidden_size hidden_dim width", "mlp_hidden": "d_ff",
    "n_head": "n_heads num_heads", "n_kv_head": "n_kv_heads num_kv_heads gqa mqa",
    "n_layer": "n_layers num_layers depth", "attention": "attn attn_type mla mha diff flash",
    "position": "rope pos_emb", "rope_base": "rope_theta", "norm": "rmsnorm layernorm",
    "activation": "act swiglu relu2 gelu", "glu": "swiglu gated", "residual": "mhc hyper_connections",
    "checkpoint_interval": "always_save_checkpoint save_interval save_every save_steps",
    "eval_interval": "eval_every eval_steps", "eval_only": "eval evaluate do_eval validate test",
    "device": "backend gpu accelerator", "decode": "compile", "wandb": "wandb_log wandb_run_name report_to",
    "temperature": "temp", "max_new_tokens": "max_tokens max_length num_tokens n_tokens length",
    "num_samples": "n", "start": "prompt prompts input text file", "sample_prompt": "prompt",
    "dataset": "data", "speculative": "use_speculative", "init_from": "from_pretrained pretrained weights",
    "out_dir": "out output output_dir save_dir checkpoint_dir init_from ckpt ckpt_path checkpoint"}

# Setting that is a path -> what stands before a path in it: nothing, a comma of a list, FILE:, LINES:
# A true/false setting among them takes a path as well: --resume, --resume=false, --resume=out/x/ckpt.pt
PATHS = {**dict.fromkeys("out_dir data_dir dataset offline_dataset tokenizer resume init_from".split(), "^"),
         "update_hooks": "^|, *", "forward_hooks": "^|, *", "start": "^FILE:|^LINES:"}
DASHES = "-\N{EN DASH}\N{EM DASH}" # an editor may turn -- into one of the others


class Given(dict):
    """{name: value} of all that was given. typed: the names that the command line itself gave."""
    typed = frozenset()


class UserError(ValueError):
    """A message for a person: at most three lines, with the way out. Uncaught, it ends in exit code 2."""


def configure(namespace: dict, schema=None, argv=None, guest_of: str = "") -> Given:
    """Overrides the settings in namespace, a script's globals(), from argv. Returns all that was given.

    Fields of the dataclass schema are accepted and returned, but not put into namespace. guest_of: a script
    whose config files this one reads too. Its settings are checked and left out; --out_dir names a run of it.
    """
    sys.excepthook = report
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A closed stream is None. Each line is written at once, so that a failure shows here and not at the exit.
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr): # under an ASCII locale one accented letter would end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    settings = simple(namespace)
    fields = simple({field.name: field.default for field in dataclasses.fields(schema)}) if schema else {}
    known = {**settings, **fields, **settings} # the script's names first, and its default for a shared name
    if "--help" in argv or "-h" in argv:
        show_help(namespace, schema, known)
    given = parse(argv, {**top_level(guest_of), **known} if guest_of else known)
    if guest_of:
        given = as_guest(given, known, os.path.basename(guest_of))
    # Only now, so that an error changes nothing.
    namespace.update({name: given[name] for name in given if name in settings})
    changed = " ".join(f"{name}={value!r}" for name, value in given.items() if value != known[name])
    if changed: # on stderr, because stdout may go into a file: sample.py > story.txt
        print(textwrap.fill(f"settings: {changed}", 110, subsequent_indent=" " * 10, break_long_words=False,
                            break_on_hyphens=False), file=sys.stderr)
    return given


def simple(names):
    """The settings among {name: value}. NAMES in capitals are constants, _names are private."""
    return {name: value for name, value in names.items()
            if type(value) in KIND and not name.isupper() and not name.startswith("_")}


def top_level(path: str) -> dict:
    """{name: default} of the settings at the top of a script that is not run."""
    found = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        with suppress(ValueError): # not a literal, so not a setting
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return simple(found)


def as_guest(given, known, host):
    """given without the settings that only host knows. A typed --out_dir stands for the model of that run."""
    folder = given.pop("out_dir", "") # in a config file it is where host will write
    if "out_dir" in given.typed:
        if "model_size" in given.typed:
            raise UserError("out_dir and model_size both choose a model; drop one")
        path, run = os.path.join(folder, "run.json"), Given()
        try:
            saved = dict(json.loads(Path(path).read_text(encoding="utf-8"))["config"]["model"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"cannot read {path}\nGive the folder of a run, or drop --out_dir") from error
        for name, value in saved.items():
            if name not in known:
                raise unknown(name, known, path, "Use the commit that this file names.")
            run[name] = checked(fit, name, value, known[name], path)
        changed = {name: run[name] for name in run if run[name] != known[name] or name == "vocab_size"}
        run = Given(changed | {name: given[name] for name in given if name in given.typed})
        given, run.typed = run, given.typed - {"out_dir"}
    for name in sorted(given.keys() - known.keys()):
        if name in given.typed:
            print(f"{name} has no effect here: it is of {host}", file=sys.stderr)
        del given[name]
    return given


def parse(argv, known):
    """The Given of all config files and flags. No shell replaces the ~ of a path after a =, so this does."""
    given, queue = Given(), list(argv)
    while queue:
        arg = queue.pop(0)
        if arg.startswith("--"):
            name, value = parse_flag(arg, queue, known)
            given[name], given.typed = value, given.typed | {name}
        elif arg.startswith(tuple(DASHES)):
            raise UserError(f"{brief(arg)}: a setting takes two dashes, as in --{arg.lstrip(DASHES)}")
        else:
            given.update(load_file(arg, known)) # but not typed, which is for the command line
    for name in [name for name in PATHS if type(given.get(name)) is str]:
        place = f"({PATHS[name]})(~[^/,]*)" # ~ or ~user, up to the next slash or comma
        given[name] = re.sub(place, lambda found: found[1] + os.path.expanduser(found[2]), given[name])
    return given


def parse_flag(arg, queue, known):
    """(name, value) of one --argument. The value comes off the queue if it is the next argument."""
    key, equals, text = arg[2:].partition("=") # at the first =, so that --start=a=b is the text a=b
    asked = key.replace("-", "_")
    name = asked if asked in known else asked.removeprefix("no_")
    default, bare = known.get(name), not queue or queue[0].startswith("--")
    if name in known and not bare:
        if not equals and queue[0].startswith("=") or arg.endswith("=") and type(default) in (int, float):
            raise UserError(f"{arg} {queue[0]}: no space stands beside the =, as in --{key}={default!r}")
    if not equals and (type(default) is bool or default == "auto" and (bare or name != asked)):
        # Else `--compile false` would switch compile on and then look for a config file called false,
        # and `--resume out/x/ckpt.pt` for one called ckpt.pt.
        if name == asked and not bare and (queue[0].lower() in WORDS or queue[0].endswith(".pt")):
            raise UserError(f"--{key} {queue[0]}: write --{key}={queue[0]}")
        return name, fit(name == asked, default)
    if asked not in known:
        raise unknown(asked, known, "command line", "--help lists all.")
    if bare and not equals:
        raise UserError(f"--{key} needs a value, as in --{key}={default!r}")
    return name, checked(from_text, name, text if equals else queue.pop(0), default, "command line")


def load_file(path, known):
    """{name: value} of a config file. It runs apart from the script: only what is returned gets out."""
    if not os.path.isfile(path):
        raise missing(path, known)
    try:
        nodes = ast.walk(ast.parse(Path(path).read_bytes(), path))
        names = sorted((node for node in nodes if isinstance(node, ast.Name)), key=lambda node: node.lineno)
        # Only programs such as train.py use these names, and running train.py would train.
        program = not {"configure", "__name__"}.isdisjoint(node.id for node in names)
        bound = {} if program else runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise broken(path, error, known) from error
    if program:
        raise UserError(f"{path} is a program; a config file only gives values to settings")
    given = {}
    rows = {node.id: node.lineno for node in names if isinstance(node.ctx, ast.Store)} # the last one counts
    for name, value in bound.items():
        origin = f"{path}:{rows[name]}" if name in rows else path
        if name.startswith("_") or callable(value) or inspect.ismodule(value): # a def, class or import
            continue
        if name in known:
            given[name] = checked(fit, name, value, known[name], origin)
        elif isinstance(value, (*KIND, list)): # most likely a setting misspelt, which in silence costs a run
            raise unknown(name, known, origin, f"A scratch variable needs an underscore: _{name}")
    if not given:
        print(f"{path} sets nothing", file=sys.stderr)
    return given


# --- types: the default decides ---
def checked(convert, name: str, value, default, origin: str):
    """convert(value, default), or the UserError that says what would have fitted."""
    also_a_path = type(default) is bool and name in PATHS and type(value) is str
    if also_a_path and value and value.lower() not in WORDS:
        return value
    try:
        return convert(value, default)
    except (ValueError, TypeError, LookupError, OverflowError, SyntaxError, RecursionError, MemoryError):
        must = f"must be {KIND[type(default)]}. The default is {brief(default)}."
        raise UserError(f"{name} = {brief(value)} ({origin}): {must}") from None


def fit(value, default):
    """value in the type of default, or a ValueError. It bends only int -> float and list -> tuple."""
    if type(value) is list: # JSON, as in run.json, has no tuples
        value = tuple(value)
    if type(default) is float and type(value) is int:
        value = float(value)
    if default == "auto" and type(value) is bool: # compile = False, as nanoGPT's config files have it
        value = str(value).lower()
    if type(value) is not type(default) or value != value: # only nan differs from itself
        raise ValueError(value)
    alike = type(default) is tuple and len(set(map(type, default))) == 1 # () says nothing about its items
    return tuple(fit(item, default[0]) for item in value) if alike else value


def from_text(text: str, default):
    """What was typed, in the type of default, or an error that checked knows. Any text is a str."""
    if type(default) is str:
        return text
    if type(default) is bool:
        return WORDS[text.lower()]
    if type(default) is float:
        return fit(float(text), default)
    if type(default) is tuple:
        value = ast.literal_eval(text.strip() or "()")
        return fit(value if isinstance(value, (tuple, list)) else (value,), default) # --depths=2 is one depth
    value = float(text) if set(text) & set(".eE") else int(text) # float alone would round a long seed
    return int(value) if value == int(value) else fit(value, default) # 1e4 is an int, 1.5 is refused


# --- messages ---
def brief(value):
    """repr, cut to a length that leaves room for the rest of the message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown(asked, known, origin, hint):
    typed = asked.lower().replace(".", "_").strip("_")
    plain = {typed, typed.removeprefix("use_"), typed.removesuffix("s")}
    near = [name for name, words in SYNONYMS.items() if name in known and plain & {*words.split()}]
    near = near or difflib.get_close_matches(typed, known, n=3, cutoff=0) # cutoff 0 always finds something
    return UserError(f"unknown setting {brief(asked)} ({origin})\nNearest: {', '.join(near)}. {hint}")


def missing(path, known=()):
    """The error for a config file that is not there. It names the files that are, or the most similar."""
    folder, name = os.path.split(path)
    paths = [found for place in ([folder] if folder else ["config", "."])
             for found in sorted(Path(place).glob("*.py"))]
    by_name = {found.stem: str(found) for found in reversed(paths)} # reversed: config/x.py before ./x.py
    near = difflib.get_close_matches(name.removesuffix(".py"), by_name)
    there = ", ".join([by_name[stem] for stem in near] or map(str, paths[:8])) or "no .py file in that folder"
    hint = f"There is: {there}"
    if "=" in path or path in known:
        hint = f"A setting takes two dashes: --{path.lstrip('/')}"
    elif os.path.isdir(path) and path != "config":
        hint = meant_for(path, known) or hint
    elif name == "prepare.py": # nanoGPT has one for each dataset
        hint = "Datasets are made by: python data.py prepare NAME, and listed by: python data.py list"
    elif judged := re.match(r"eval_(gpt2\w*)", name): # nanoGPT has one for each size
        hint = f"An evaluation is: python train.py --eval_only --init_from={judged[1].replace('_', '-')}"
    return UserError(f"no config file {path!r}\n{hint}")


def meant_for(path, known):
    """A sentence with the setting that a path was meant for, which is there but no config file."""
    kind = "out_dir" if os.path.exists(os.path.join(path, "run.json")) else "dataset"
    names = ["resume" if path.endswith(".pt") else kind, "out_dir"]
    flags = [f"--{name}={path}" for name in names if name in known]
    return f"A config file is ordinary Python. Did you mean {flags[0]}?" if flags else ""


def broken(path, error, known):
    """The error for a config file that raises, with the line in that file, not in a module it called."""
    rows = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path: # no frame has path: it never ran
        rows.append(error.lineno)
    place = f"{path}:{rows[-1]}" if rows else path
    hint = "A config file is ordinary Python." if path.endswith(".py") else meant_for(path, known)
    text = " ".join(str(getattr(error, "msg", error)).split()) # a SyntaxError's str repeats file and line
    return UserError(f"{place}: {type(error).__name__}: {text[:200]}\n{hint}")


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch on any device found no memory: torch has several errors for that."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
    return "MemoryError" in type(error).__name__ or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def report(kind, error, trace):
    """sys.excepthook: a few lines for what a person did or the machine lacks; a bug keeps its traceback."""
    gone, full = issubclass(kind, BrokenPipeError), getattr(error, "errno", None) == errno.ENOSPC
    if gone or full:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1) # else the last flush of stdout fails too
    if gone:
        raise SystemExit(141) # the reader has enough, as in `| head`
    if issubclass(kind, KeyboardInterrupt):
        with suppress(OSError): # the same Ctrl-C may have ended the tee that reads this
            os.write(2, b"\n" * sys.stderr.isatty() + b"stopped\n") # a terminal has ^C on this line already
        raise SystemExit(130)
    if out_of_memory(error):
        error = f"not enough memory: {str(error)[:200]}\nMake the model, the batch or the text smaller"
    elif not issubclass(kind, UserError) and not full:
        return sys.__excepthook__(kind, error, trace)
    print("error: " + "\n".join(str(error).splitlines()[:3]), file=sys.stderr)
    raise SystemExit(2) # Python takes the exit code of a SystemExit that leaves the hook


@contextmanager
def user_errors():
    """Turns a ValueError, or a file that cannot be opened, into a UserError. Not for loops: it hides bugs."""
    try:
        yield
    except (UserError, BrokenPipeError): # the second is a reader that has gone: see report
        raise
    except (OSError, ValueError) as error:
        path = getattr(error, "filename", None) # a ValueError has none
        hint = "\nname a folder instead" if isinstance(error, FileExistsError) else ""
        raise UserError(f"cannot open {path}: {error.strerror}{hint}" if path else str(error)) from error


def git_commit() -> str:
    """The commit of these files, with -dirty where files differ from it; "unknown" outside a checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"] # no tag names
    folder = os.path.dirname(os.path.abspath(__file__))
    with suppress(OSError): # no git on this machine
        done = subprocess.run(describe, cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    return "unknown"


# --- help: from the comments in the source, so that they are written once ---
def show_help(namespace, schema, known):
    """Prints every setting with its default and its comment, and exits with 0."""
    script = Path(namespace.get("__file__", "")) # a session at a prompt has none
    print(f"usage: python {script.name or 'script.py'} [config/file.py ...] [--name=value ...]\n"
          "A true/false setting is also --name or --no-name. In the order written, later wins.")
    source = script.read_text(encoding="utf-8") if script.is_file() else ""
    body = ast.parse(source).body
    body += [inner for node in body if isinstance(node, ast.If) for inner in node.body] # under the main guard
    texts = comments(source, body, "")
    with suppress(OSError, TypeError): # no schema, or one typed at a prompt: no source either
        source = textwrap.dedent(inspect.getsource(schema))
        texts = {**comments(source, ast.parse(source).body[0].body, f"{schema.__name__}: "), **texts}
    last = None
    for name, default in known.items():
        heading, text = texts.get(name, ("", ""))
        if heading != last:
            print(f"\n{heading}".rstrip(" :\n"))
        left, last = f"  --{name}={brief(default)}", heading
        print(textwrap.fill(text, 110, initial_indent=f"{left:<35} ", subsequent_indent=" " * 36) or left)
    raise SystemExit(0)


def comments(source, body, title):
    """{name: (heading, comment)} of the assignments in body. A comment ends the line, or stands above it.

    A heading, as in `# --- data ---`, is for all that follow. So is one comment line above a setting that has
    a comment of its own.
    """
    lines, found, heading, block = source.split("\n"), {}, "", []
    nodes = {node.lineno: node for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))}
    for row, line in enumerate(map(str.strip, lines), start=1):
        if row in nodes:
            own = lines[nodes[row].end_lineno - 1].partition(" # ")[2] # a long value has it on its last line
            if own and len(block) == 1:
                heading = block[0]
            for node in ast.walk(nodes[row]):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    # The first assignment is the setting.
                    found.setdefault(node.id, (title + heading, own or " ".join(block)))
        ruled = re.match(r"#\s*[-=]{2}", line) # such as # --- data --- or # ======
        if ruled:
            heading = line.strip("#-= ") or heading # a bare ----- only separates
        block = [*block, line.strip("# ")] if line.startswith("#") and not ruled else []
    return found
