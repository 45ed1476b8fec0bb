"""configurator.py: what each argument means, and what a person reads when it means nothing.

The tables run configure in this process; what only a process can show (exit code, streams, no traceback) runs
a real script.
"""
import ast
import dataclasses
import json
import os
import re
import runpy
import signal
import subprocess
import sys

import pytest

from configurator import SYNONYMS, UserError, configure, top_level, user_errors
from conftest import ROOT

SCRIPTS = ("train.py", "sample.py", "bench.py", "data.py", "model.py", "optim.py")


@dataclasses.dataclass
class ToyConfig:
    # size
    n_layer: int = 6 # blocks
    dropout: float = 0.0 # share of units dropped

    # --- variants ---
    # what a head attends with
    attention: str = "mha"
    bias: bool = False # in every linear
    depths: tuple = () # layers to leave early
    block_size: int = 1024 # the script below has this name too


DEFAULTS = dict(out_dir="out", batch_size=12, learning_rate=1e-3, compile=True, resume=False,
                betas=(0.9, 0.95), widths=(2, 4), block_size=64)

SCRIPT = '''"""A toy script."""
import dataclasses, os, sys
from configurator import UserError, configure, user_errors
import slow # stands for torch

def helper():
    out_dir = 'local' # not the setting
    return out_dir

# --- data ---
out_dir = 'out#1' # where the run goes: café
# how many sequences,
# per step
batch_size = 12
# optimizer
learning_rate = 1e-3 # peak rate
compile = True # use torch.compile, REPEATED
betas = (0.9,
         0.95) # decay of the two means
silent = False
# two lines about one setting
# are not a heading
block_size = 64 # the script's own

@dataclasses.dataclass
class ToyConfig:
    n_layer: int = 6 # blocks
    # --- variants ---
    bias: bool = False # in every linear
    block_size: int = 1024 # hidden by the script's

given = configure(globals(), ToyConfig)
if out_dir == 'bug': raise KeyError('a bug')
if out_dir == 'value': raise ValueError('a bug in the script')
if out_dir == 'lines': raise UserError('one\\ntwo\\nthree\\nfour')
if out_dir == 'locale': print('é')
if out_dir == 'memory': raise MemoryError()
if out_dir == 'wait': print('waiting', flush=True); os.read(0, 1)
with user_errors():
    if out_dir == 'illegal': raise ValueError('n_layer=0 builds nothing; use 1 or more')
    if out_dir == 'nowhere': open('no/such/file')
if not silent: print('END', dict(sorted(given.items())), type(learning_rate).__name__, learning_rate, out_dir,
                     'n_layer' in globals())
batch_size = 'not a setting any more' # nor is this its comment
'''.replace("REPEATED", "wrapped " * 10)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has a folder of its own as working directory; configure's hook does not outlive it."""
    monkeypatch.chdir(tmp_path)
    for name in ("excepthook", "argv", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


def write(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def give(*argv, **more):
    """(given, namespace) after configure saw argv."""
    namespace = {"__name__": "toy", "_private": 1, "os": os, "table": {}, **DEFAULTS, **more}
    return configure(namespace, ToyConfig, list(argv)), namespace


def refusal(*argv):
    """The message of the UserError that argv must end in. Whatever the reason, three lines at most and no
    setting changed.
    """
    namespace = dict(DEFAULTS)
    with pytest.raises(UserError) as caught:
        configure(namespace, ToyConfig, list(argv))
    assert namespace == DEFAULTS
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def start(*argv, slow="", stdout=subprocess.PIPE, more={}, **env):
    """SCRIPT started as a person would. slow: the text of a module that it imports."""
    write("train.py", SCRIPT), write("slow.py", slow)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "", "PYTHONUNBUFFERED": "", **env}
    streams = dict(stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "train.py", *argv], env=env, **streams, **more)


def run(*argv, **env):
    """(exit code, stdout, stderr without the list of settings) of SCRIPT."""
    process = start(*argv, **env)
    out, err = process.communicate(timeout=60)
    kept = [line for line in err.decode("utf-8").splitlines(keepends=True)
            if not line.startswith(("settings:", " " * 10))]
    return process.returncode, (out or b"").decode("utf-8"), "".join(kept)


def door(script, *argv):
    """One of the project's scripts in this process, up to the SystemExit or UserError that ends it."""
    sys.argv = [script, *argv] # own_folder puts the old one back
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")


# --- the command line ---


@pytest.mark.parametrize("argv, name, value", [
    (["--learning_rate=1"], "learning_rate", 1.0), # int -> float
    (["--learning_rate=inf"], "learning_rate", float("inf")),
    (["--learning-rate=3e-4"], "learning_rate", 3e-4), # a-b is a_b
    (["--learning_rate", "-2"], "learning_rate", -2.0),
    (["--batch_size=1e1"], "batch_size", 10),
    (["--batch_size=1_000"], "batch_size", 1000),
    (["--batch_size=-3"], "batch_size", -3),
    (["--batch_size=9007199254740993"], "batch_size", 2**53 + 1), # through float it would be even
    (["--batch_size", "5"], "batch_size", 5),
    (["--out_dir=123"], "out_dir", "123"),
    (["--out_dir=a=b"], "out_dir", "a=b"),
    (["--out_dir="], "out_dir", ""),
    (["--out_dir", "a b"], "out_dir", "a b"),
    (["--out_dir=--help"], "out_dir", "--help"),
    (["--out_dir=(1,2)"], "out_dir", "(1,2)"),
    (["--compile=false"], "compile", False),
    (["--compile=0"], "compile", False),
    (["--compile=no"], "compile", False),
    (["--compile=Off"], "compile", False),
    (["--resume=TRUE"], "resume", True),
    (["--resume=1"], "resume", True),
    (["--resume=yes"], "resume", True),
    (["--resume=on"], "resume", True),
    (["--resume"], "resume", True),
    (["--resume=o/step_000500.pt"], "resume", "o/step_000500.pt"), # the one switch that takes a path as well
    (["--no-compile"], "compile", False),
    (["--no_compile"], "compile", False),
    (["--widths=(2,4,8)"], "widths", (2, 4, 8)),
    (["--widths=2,4,8"], "widths", (2, 4, 8)),
    (["--widths=[3]"], "widths", (3,)),
    (["--widths=3"], "widths", (3,)),
    (["--widths="], "widths", ()),
    (["--betas=0,1"], "betas", (0.0, 1.0)), # items bend as values do
    (["--batch_size=1", "--compile", "--batch_size=2"], "batch_size", 2), # later wins
    (["--no-compile", "--compile"], "compile", True),
    (["--n-layer=2"], "n_layer", 2), # from here on: fields of the schema
    (["--dropout=0"], "dropout", 0.0),
    (["--attention", "mla"], "attention", "mla"),
    (["--bias"], "bias", True),
    (["--depths=2,4"], "depths", (2, 4))
])
def test_accepted(argv, name, value):
    given, namespace = give(*argv)
    assert given[name] == value and type(given[name]) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, given[name])) == list(map(type, value))
    if name in DEFAULTS:
        assert namespace[name] == value
    else:
        assert name not in namespace # a schema field is only returned


@pytest.mark.parametrize("argv, fragments", [
    (["--learning_rte=1"], ["learning_rte", "command line", "Nearest: learning_rate", "--help"]),
    (["--zzz=1"], ["zzz", "Nearest: "]),
    (["--n_layers=1"], ["n_layers", "n_layer"]),
    (["--=1"], ["unknown setting"]),
    (["--_private=1"], ["_private"]),
    (["--os=1"], ["'os'"]),
    (["--no-batch_size"], ["no_batch_size", "batch_size"]),
    (["--no-compile=true"], ["no_compile", "compile"]),
    (["--a\nb\nc\nd=1"], ["unknown setting"]),
    (["--batch_size=1.5"], ["batch_size", "'1.5'", "an int", "default is 12"]),
    (["--batch_size=many"], ["'many'", "an int"]),
    (["--batch_size=inf"], ["an int"]),
    (["--batch_size=1e999"], ["an int"]),
    (["--batch_size=true"], ["an int"]),
    (["--batch_size=" + "7" * 9000], ["an int", "..."]), # and not nine thousand digits
    (["--learning_rate=fast"], ["'fast'", "a float", "default is 0.001"]),
    (["--learning_rate=nan"], ["'nan'", "a float"]),
    (["--compile=maybe"], ["'maybe'", "true or false", "default is True"]),
    (["--compile="], ["true or false"]),
    (["--compile", "false"], ["--compile=false"]),
    (["--resume", "o/ckpt.pt"], ["--resume=o/ckpt.pt"]),
    (["--resume="], ["true or false"]),
    (["--widths=2,x"], ["'2,x'", "a tuple", "default is (2, 4)"]),
    (["--widths=2,1.5"], ["a tuple"]), # an item of the wrong type
    (["--widths=((("], ["a tuple"]),
    (['--widths=__import__("os")'], ["a tuple"]),
    (["--widths={1: 2}"], ["a tuple"]),
    (["--bias=7"], ["bias", "true or false", "default is False"]),
    (["--batch_size"], ["--batch_size", "needs a value", "--batch_size=12"]),
    (["--batch_size", "--compile"], ["needs a value"]),
    (["-batch_size=1"], ["two dashes", "--batch_size=1"]),
    (["batch_size=1"], ["no config file", "--batch_size=1"]),
    # and refusal() sees that batch_size is unchanged
    (["--batch_size=1", "--learning_rate=x"], ["learning_rate"]),
])
def test_refused(argv, fragments):
    message = refusal(*argv)
    for fragment in fragments:
        assert fragment in message
    assert "Nearest: ." not in message # nothing may be near, still something is named


def test_nothing_given(capsys):
    given, namespace = give()
    assert given == {} and {name: namespace[name] for name in DEFAULTS} == DEFAULTS
    assert capsys.readouterr() == ("", "")


def test_changed_settings_are_printed_once_each(capsys):
    give("--batch_size=1", "--out_dir=x", "--batch_size=2", "--bias", "--n_layer=6")
    assert capsys.readouterr() == ("", "settings: batch_size=2 out_dir='x' bias=True\n") # sample.py > story
    give("--n_layer=6") # the default
    assert capsys.readouterr() == ("", "")
    give(f"--out_dir={(long := 'a-long-name/' * 9)}", "--bias")
    assert capsys.readouterr().err == f"settings:\n{' ' * 10}out_dir='{long}'\n{' ' * 10}bias=True\n"


def test_shared_name_has_the_scripts_default(capsys):
    given, namespace = give("--block_size=8")
    assert given == {"block_size": 8} and namespace["block_size"] == 8
    assert capsys.readouterr().err == "settings: block_size=8\n"


def test_without_schema():
    namespace = {"steps": 1}
    assert configure(namespace, argv=["--steps=2"]) == {"steps": 2} and namespace == {"steps": 2}
    with pytest.raises(UserError, match="n_layer"):
        configure(namespace, argv=["--n_layer=2"])


def test_argv_is_left_alone():
    argv = ["--batch_size", "5"]
    configure(dict(DEFAULTS), argv=argv)
    assert argv == ["--batch_size", "5"]


def test_typed_is_what_the_command_line_gave():
    path = write("x.py", "batch_size = 3\nn_layer = 2")
    given = give("--batch_size=1", path, "--no-compile", "--attention", "mla")[0]
    assert given == {"batch_size": 3, "n_layer": 2, "compile": False, "attention": "mla"}
    assert given.typed == {"batch_size", "compile", "attention"}
    assert give(path)[0].typed == give()[0].typed == set()


@pytest.mark.parametrize("name, text, expected", [
    ("out_dir", "~/run", "/home/ada/run"),
    ("out_dir", "~", "/home/ada"),
    ("out_dir", "a/~/b", "a/~/b"),
    ("data_dir", "~/d", "/home/ada/d"),
    ("dataset", "~/book.txt", "/home/ada/book.txt"),
    ("offline_dataset", "~/book.txt", "/home/ada/book.txt"),
    ("tokenizer", "~/t.json", "/home/ada/t.json"),
    ("update_hooks", "~/a.py:f,identity, ~/b.py:g=2", "/home/ada/a.py:f,identity, /home/ada/b.py:g=2"),
    ("forward_hooks", "~/a.py:f", "/home/ada/a.py:f"),
    ("init_from", "~/gpt2", "/home/ada/gpt2"),
    ("start", "FILE:~/p.txt", "FILE:/home/ada/p.txt"),
    ("start", "LINES:~/p.txt", "LINES:/home/ada/p.txt"),
    ("start", "~/p.txt", "~/p.txt"), # a prompt, not a path
    ("start", "~", "~"),
    ("sample_prompt", "~/", "~/")
])
def test_a_tilde_is_the_home_folder(name, text, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for arg in (f"--{name}={text}", write("x.py", f"{name} = {text!r}")):
        given, namespace = give(arg, **{name: ""})
        assert given[name] == namespace[name] == expected


@pytest.mark.parametrize("typed, expected", [
    ("lr", "learning_rate"),
    ("seq_len", "block_size"),
    ("max_seq_len", "block_size"),
    ("ctx", "block_size"),
    ("epochs", "max_iters"),
    ("max_steps", "max_iters"),
    ("grad_accum", "gradient_accumulation_steps"),
    ("wd", "weight_decay"),
    ("bs", "batch_size"),
    ("d-model", "n_embd"),
    ("hidden_size", "n_embd"),
    ("num_heads", "n_head"),
    ("depth", "n_layer"),
    ("prompt", "sample_prompt"),
    ("output", "out_dir"),
    ("checkpoint_dir", "out_dir"),
    ("data", "dataset"),
    ("warmup_steps", "warmup_iters"),
    ("betas", "beta1, beta2")
])
def test_names_of_other_programs(typed, expected):
    from model import GPTConfig

    with pytest.raises(UserError, match=f"unknown setting .*\nNearest: {expected}[.] "):
        configure(top_level(os.path.join(ROOT, "train.py")), GPTConfig, [f"--{typed}=1"])


def test_synonyms_name_settings_that_exist():
    from model import GPTConfig

    known = {f.name for f in dataclasses.fields(GPTConfig)}
    for script in SCRIPTS:
        known.update(top_level(os.path.join(ROOT, script)))
    assert SYNONYMS.keys() <= known and "use_speculative" in SYNONYMS["speculative"]
    assert "weight_decay" not in refusal("--wd=1") # the toy script has none


def test_capitals_are_constants():
    namespace = {"rate": 1.0, "MAX_SKIPPED": 5}
    with pytest.raises(UserError, match="MAX_SKIPPED"):
        configure(namespace, argv=["--MAX_SKIPPED=6"])
    assert top_level(write("x.py", "MAX_SKIPPED = 5\nrate = 1.0")) == {"rate": 1.0}


# --- guests: a script that reads another one's config files, as model.py reads train.py's ---


def visit(*argv):
    guest = write("guest.py", 'learning_rate = 1e-3\nout_dir = "out"\nN = 1')
    namespace = {"model_size": "", "out_dir": ""}
    return configure(namespace, ToyConfig, list(argv), guest_of=guest), namespace


def a_run(model):
    write("run/run.json", json.dumps({"config": {"model": model}}))


def test_a_guests_setting_is_left_out_aloud_if_typed(capsys):
    path = write("x.py", 'learning_rate = 1.0\nn_layer = 2\nout_dir = "nowhere"')
    assert visit(path) == ({"n_layer": 2}, {"model_size": "", "out_dir": ""})
    assert capsys.readouterr() == ("", "settings: n_layer=2\n")
    assert visit("--learning_rate=2", path)[0] == {"n_layer": 2}
    assert "learning_rate has no effect here: it is of guest.py\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="a float"):
        visit("--learning_rate=fast")


def test_a_typed_out_dir_is_the_model_of_that_run(capsys):
    a_run({"n_layer": 3, "dropout": 0.0, "depths": [1, 3], "bias": True})
    path = write("x.py", 'n_layer = 2\nattention = "mla"\nmodel_size = "nano"')
    given, namespace = visit(path, "--out_dir=run", "--no-bias", "--block_size=8")
    assert given == {"n_layer": 3, "depths": (1, 3), "bias": False, "block_size": 8}
    assert given.typed == {"bias", "block_size"} and namespace["model_size"] == ""
    assert "depths=(1, 3)" in capsys.readouterr().err


@pytest.mark.parametrize("model, argv, fragments", [
    (None, [], ["nowhere/run.json", "drop --out_dir"]),
    (None, ["--out_dir="], ["run.json", "drop --out_dir"]),
    ({"n_layer": "x"}, ["--out_dir=run"], ["n_layer", "run/run.json", "an int"]),
    ({"n_layr": 1}, ["--out_dir=run"], ["n_layr", "run/run.json", "commit"]),
    ([1], ["--out_dir=run"], ["run/run.json", "drop --out_dir"]),
    ({}, ["--out_dir=run", "--model_size=nano"], ["model_size", "drop one"])
])
def test_no_run_to_take_a_model_from(model, argv, fragments):
    a_run(model)
    with pytest.raises(UserError) as caught:
        visit("--out_dir=nowhere", *argv)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments) and len(message.splitlines()) <= 3


# --- config files ---


@pytest.mark.parametrize("text, expected", [
    ("batch_size = 3", {"batch_size": 3}),
    ("learning_rate = 1", {"learning_rate": 1.0}),
    ("widths = [1, 2]", {"widths": (1, 2)}),
    ("n_layer = 2\ndropout = 0", {"n_layer": 2, "dropout": 0.0}),
    ("import time, os\nbatch_size = 3", {"batch_size": 3}),
    ("def compile(): pass\nclass Resume: pass\nfrom os import getcwd", {}),
    ("_half = 4\nbatch_size = 2 * _half", {"batch_size": 8}),
    ("for _i in range(3): batch_size = _i", {"batch_size": 2}),
    # a dict is no simple type, so no setting misspelt
    ('table = {"a": 1}\nbatch_size = table["a"]', {"batch_size": 1}),
    ('# é\nout_dir = "é"', {"out_dir": "é"})
])
def test_file_accepted(text, expected):
    given, namespace = give(write("config/x.py", text))
    assert given == expected and all(type(given[name]) is type(expected[name]) for name in expected)
    changed = {name: value for name, value in expected.items() if name in DEFAULTS}
    assert {name: namespace[name] for name in DEFAULTS} == {**DEFAULTS, **changed}
    assert not {"time", "_half", "_i", "Resume", "getcwd", "n_layer"} & set(namespace) # nothing leaks


@pytest.mark.parametrize("text, fragments", [
    ("batch_size = 3\nlearning_rte = 1",
     ["learning_rte", "config/x.py:2", "Nearest: learning_rate", "_learning_rte"]),
    ("learning_rte = 1\nlearning_rte = 2", ["config/x.py:2"]), # the assignment that made the value
    ("widhts = [1]", ["widhts", "widths"]), # a list counts as a tuple here too
    ("for i in range(3): batch_size = i", ["'i'", "config/x.py:1", "underscore: _i"]),
    ('\nbatch_size = "3"', ["batch_size", "'3'", "config/x.py:2", "an int", "default is 12"]),
    ("batch_size = True", ["True", "an int"]),
    ("batch_size = 1.0", ["1.0", "an int"]),
    ("compile = 1", ["1", "true or false"]),
    ("out_dir = 5", ["5", "a str"]),
    ("out_dir = None", ["None", "a str"]), # a known name of no simple type is wrong, not ignored
    ('learning_rate = "1"', ["'1'", "a float"]),
    ('learning_rate = float("nan")', ["nan", "a float"]),
    ("learning_rate = 10 ** 400", ["a float"]),
    ('widths = ("a", "b")', ["a tuple"]),
    ('bias = "yes"', ["bias", "true or false"]),
    ("x = 1\nbatch_size = 1 / 0", ["config/x.py:2", "ZeroDivisionError: division by zero"]),
    ('import json\n\njson.loads("{")', ["config/x.py:3: ", "JSONDecodeError"]), # the file's line, not json's
    ("batch_size = 3\nlearning_rate = = 1", ["config/x.py:2", "SyntaxError: invalid syntax"]),
    ('raise ValueError("a\\nb\\nc\\nd\\n" * 99)', ["config/x.py:1", "ValueError: a b c d"]),
    ("import sys; sys.exit(0)", ["config/x.py:1", "SystemExit"]), # else a run would end as a success
    ("batch_size = learning_rate", ["config/x.py:1", "NameError"]), # it runs apart from the script
])
def test_file_refused(text, fragments):
    message = refusal(write("config/x.py", text))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_no_config_file(script):
    """It would run: train.py given to train.py trains."""
    assert "is a program" in refusal(os.path.join(ROOT, script))


def test_a_program_does_not_run():
    path = write("x.py", 'open("ran", "w")\nbatch_size = 3\nif __name__ == "__main__": pass')
    assert "x.py is a program" in refusal(path) and not os.path.exists("ran")


def test_a_file_that_sets_nothing_says_so(capsys):
    assert give(write("x.py", "# batch_size = 3"))[0] == {}
    assert capsys.readouterr() == ("", "x.py sets nothing\n")


def test_import_with_the_name_of_a_setting():
    namespace = {"time": 1}
    assert configure(namespace, argv=[write("x.py", "import time")]) == {} and namespace == {"time": 1}


def test_long_error_in_a_file_is_cut():
    assert len(refusal(write("x.py", 'raise ValueError("long " * 999)'))) < 300


def test_files_and_flags_in_the_order_written():
    one, two = write("one.py", 'batch_size = 1\nout_dir = "one"'), write("two.py", "batch_size = 2")
    assert give(one, two)[0] == {"batch_size": 2, "out_dir": "one"}
    assert give(two, one)[0]["batch_size"] == 1
    assert give(one, "--batch_size=3")[0]["batch_size"] == 3
    assert give("--batch_size=3", one)[0]["batch_size"] == 1
    assert give("--compile", one)[0]["compile"] is True # a bare flag does not swallow the file


@pytest.mark.parametrize("path, expected", [
    ("config/smal.py", "There is: config/small.py"), # the near one, not all
    ("config/small", "There is: config/small.py"),
    ("small.py", "config/small.py"), # a bare name is looked for in config/
    ("trian.py", "train.py"),
    ("config/qqq.py", "config/large_run.py, config/small.py"), # nothing near: all
    ("config", "config/small.py"), # a folder is no config file
    ("elsewhere/x.py", "no .py file in that folder"),
    ("", "no config file")
])
def test_missing_file_names_those_that_exist(path, expected):
    for name in ("config/small.py", "config/large_run.py", "train.py"):
        write(name, "")
    message = refusal(path)
    assert repr(path) in message and expected in message
    if expected.startswith("There is: "):
        assert "large_run" not in message


def test_missing_file_prefers_the_config_folder():
    for name in ("config/small.py", "small.py"):
        write(name, "")
    assert "There is: config/small.py" in refusal("smal.py")


# --- whole processes ---


def test_process_success():
    code, out, err = run("--learning_rate=1", "--n_layer=3", "--out_dir=a=b")
    assert (code, err) == (0, "")
    assert out == "END {'learning_rate': 1.0, 'n_layer': 3, 'out_dir': 'a=b'} float 1.0 a=b False\n"


@pytest.mark.parametrize("argv, text, fragment", [
    (["--nonsense=1"], "", "nonsense"),
    (["--batch_size=x"], "", "an int"),
    (["x.py"], "learning_rte = 1", "x.py:1"),
    (["x.py"], 'batch_size = "1"', "x.py:1"),
    (["x.py"], "1 / 0", "ZeroDivisionError"),
    (["gone.py"], "", "gone.py"),
    (["--out_dir=illegal"], "", "n_layer=0 builds nothing; use 1 or more"), # a ValueError inside user_errors
    (["--out_dir=nowhere"], "", "cannot open no/such/file: No such file or directory"),
    (["--out_dir=lines"], "", "one\ntwo\nthree"), # the fourth line is cut
    (["--out_dir=memory"], "", "not enough memory")
])
def test_process_user_error_exits_with_2(argv, text, fragment):
    write("x.py", text)
    code, out, err = run(*argv)
    assert code == 2 and "END" not in out
    assert err.startswith("error: ") and fragment in err and "Traceback" not in err
    assert 1 <= len(err.splitlines()) <= 3


@pytest.mark.parametrize("kind", ["bug", "value"])
def test_process_bug_keeps_its_traceback(kind):
    code, out, err = run(f"--out_dir={kind}")
    assert code == 1 and "Traceback" in err and "a bug" in err and "error: " not in err.splitlines()[0]


def test_process_ascii_locale():
    code, out, err = run(
        "--out_dir=locale", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii"
    )
    assert (code, err) == (0, "") and "é" in out


def test_process_bytes_that_are_no_text():
    code, out, err = run(os.fsdecode(b"--out_dir=\xff")) # the script prints it
    assert (code, err) == (0, "") and "END" in out


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "--help"], ["gone.py", "-h"]])
def test_process_help(argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, "") and "END" not in out
    assert out.startswith("usage: python train.py ") and max(map(len, out.splitlines())) <= 110
    rows = [re.sub(" +", " ", line.strip()) for line in out.splitlines()]
    assert [row for row in rows[2:] if row] == [
        "data",
        "--out_dir='out#1' where the run goes: café", # the '#' in the text starts no comment
        "--batch_size=12 how many sequences, per step", # the block above it
        "optimizer", # one line above a setting with its own comment: a heading
        "--learning_rate=0.001 peak rate",
        "--compile=True use torch.compile, " + " ".join(["wrapped"] * 7), # and on the next line:
        "wrapped wrapped wrapped",
        "--betas=(0.9, 0.95) decay of the two means",
        "--silent=False",
        "--block_size=64 the script's own",
        "ToyConfig",
        "--n_layer=6 blocks",
        "ToyConfig: variants",
        "--bias=False in every linear",
    ]


def is_value(text):
    """Whether nothing follows the value."""
    try:
        ast.literal_eval(text)
    except SyntaxError:
        return False
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_of_every_script_has_its_text(script, capsys):
    """What has none is no setting: a public number in the main part would be one."""
    with pytest.raises(SystemExit) as stop:
        door(script, "--help")
    out = capsys.readouterr().out
    rows = re.findall(r"^  --(\w+)=(.*)$", out, re.M)
    assert stop.value.code == 0 and rows and not [name for name, rest in rows if is_value(rest)]
    if script == "bench.py":
        assert "python bench.py train" in out and "kv_cache   bytes" in out # the suites


def test_suites_and_settings_in_any_order(capsys):
    door("bench.py", "--no-save", "kv_cache", "--rounds", "1")
    assert '"suite": "kv_cache"' in capsys.readouterr().out


def test_help_without_a_file(capsys):
    """An interactive session has no source; the settings are still listed."""
    with pytest.raises(SystemExit) as stop:
        give("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--batch_size=12\n" in out
    assert "ToyConfig: size" in out and re.search(r"--attention=.mha. +what a head attends with\n", out)


# --- user_errors ---


@pytest.mark.parametrize("error, message", [
    (ValueError("use 1 or more"), "use 1 or more"),
    (UnicodeError("not text"), "not text"), # a kind of ValueError
    (FileNotFoundError(2, "No such file or directory", "a.pt"),
     "cannot open a.pt: No such file or directory"),
    (PermissionError(13, "Permission denied", "a.pt"), "cannot open a.pt: Permission denied"),
    (IsADirectoryError(21, "Is a directory", "out"), "cannot open out: Is a directory"),
    (NotADirectoryError(20, "Not a directory", "out/x"), "cannot open out/x: Not a directory"),
    (FileNotFoundError("run data.py first"), "run data.py first"), # no path in it: its own words
])
def test_user_errors_turns(error, message):
    with pytest.raises(UserError) as caught:
        with user_errors():
            raise error
    assert str(caught.value) == message and caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("x"),
        RuntimeError("x"),
        ZeroDivisionError(),
        UserError("as it was"),
        BrokenPipeError(32, "Broken pipe"),
    ],
) # the last is a reader that has gone, not bad input
def test_user_errors_leaves_alone(error):
    with pytest.raises(type(error)) as caught:
        with user_errors():
            raise error
    assert caught.value is error


# --- Ctrl-C, a full disk, closed streams ---

SWALLOWS = """
print('importing', flush=True)
try: import os; os.read(0, 1)
except BaseException: pass # as a C extension may, while it is imported
print('imported')
"""


@pytest.mark.parametrize("where", ["importing", "waiting"])
def test_ctrl_c_ends_in_one_line(where):
    process = start("--out_dir=wait", slow=SWALLOWS if where == "importing" else "")
    assert process.stdout.readline().decode() == where + "\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b"" and err.decode().splitlines()[-1] == "stopped"
    assert err.count(b"\n") == (1 if where == "importing" else 2) # the setting


def test_ctrl_c_that_ends_the_reader_too():
    """train.py 2>&1 | tee log: the terminal sends it to both."""
    process = start("--out_dir=wait")
    assert process.stdout.readline() == b"waiting\n"
    process.stderr.close(), process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_an_ignored_ctrl_c_stays_ignored():
    """nohup, or a job in the background of a script."""
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start("--out_dir=wait", slow=SWALLOWS, more={"preexec_fn": ignore})
    for line in (b"importing\n", b"imported\n", b"waiting\n"):
        while (said := process.stdout.readline()) != line:
            assert said
        process.send_signal(signal.SIGINT)
        if line != b"imported\n":
            process.stdin.write(b"x"), process.stdin.flush()
    assert b"END" in process.communicate(timeout=60)[0] and process.returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_configurator_is_imported_first(script):
    """Else Ctrl-C while torch is imported is a traceback, or is swallowed."""
    with open(os.path.join(ROOT, script), encoding="utf-8") as file:
        text = file.read()
    first = next(node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert (getattr(first, "module", None) or first.names[0].name) == "configurator"
    assert "configure(globals()" in text # by this call configurator knows its scripts


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_a_reader_that_has_gone(argv):
    """As `| head` has when it has read enough; even where all is written at the exit."""
    reading, writing = os.pipe()
    os.close(reading)
    assert run(*argv, stdout=writing) == (141, "", "")
    os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        assert run(stdout=full) == (2, "", "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream(closed):
    code, out, err = run("--n_layer=3", more={"preexec_fn": lambda: os.close(closed)})
    assert code == 0 and err == "" and (out == "" if closed == 1 else out.startswith("END"))


@pytest.mark.parametrize(
    "env, count", [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_spin_briefly_unless_told_otherwise(env, count):
    """Two runs on two cores hinder each other by threads that spin. torch reads it when it is loaded, so
    before.
    """
    kept = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = ("import configurator, os, sys; assert 'torch' not in sys.modules; "
            "print(os.environ.get('GOMP_SPINCOUNT'))")
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **env, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.stdout.strip() == count, done.stderr
