"""What train.py shows while it trains."""
import ast
import io
import math
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from processes import ROOT, start
from test_train import command, ended, spoiled, train


def parts(*wanted, **names):
    """Functions of train.py by themselves, in a namespace of `names`."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") in wanted]
    assert len(body) == len(wanted)
    names.update(math=math, timedelta=timedelta, shutil=shutil, Path=Path, Callable=object)
    exec(compile(ast.Module(body, []), "train.py", "exec"), names)
    return names


def screen(written):
    """The rows that a terminal shows: a return goes back to the first column and erases nothing."""
    rows = []
    for line in written.split("\n"):
        row = ""
        for words in line.split("\r"):
            row = words + row[len(words):]
        rows.append(row.rstrip())
    return rows


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_passing_line_is_replaced_and_others_stay(on_terminal, monkeypatch):
    """On a terminal of 20 columns; each call writes once. A file gets every line whole."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    file = io.StringIO()
    names = parts("say", on_terminal=on_terminal, shown=0)
    names["print"] = lambda *words, **how: print(*words, **{**how, "file": file})
    said = [("first", False), ("step 1" + 30 * ".", True), ("step 2", True), ("found\nit\n  all", False),
            ("a", True), ("longer", True), ("", False), ("end", False)]
    lengths = []
    for words, passing in said:
        names["say"](words, passing)
        lengths.append(max(map(len, screen(file.getvalue())[-2:])))
    if on_terminal:
        assert screen(file.getvalue()) == ["first", "found", "it", "  all", "", "end", ""]
        assert lengths[1] == 19 and "step 2" in file.getvalue() # cut, so that the terminal adds no row
    else:
        assert file.getvalue() == "".join(f"{words}\n" for words, _ in said)


def test_time_left_counts_every_evaluation_that_will_come():
    """Against a loop as train.py's own, for all ends, intervals and steps. A step takes 2 s."""
    for max_iters in (1, 6, 7):
        for interval in (1, 2, 3, 10):
            for step in range(1, max_iters + 1):
                due = sum(s % interval == 0 or s == max_iters for s in range(step, max_iters + 1))
                names = parts("time_left", max_iters=max_iters, eval_interval=interval, run={"step": step},
                              eval_s=5.0)
                seconds = (max_iters - step) * 2 + due * 5
                assert names["time_left"](0.5) == timedelta(seconds=seconds), (max_iters, interval, step)


def test_the_line_of_an_evaluation():
    names = parts("verdict", run={"step": 250, "best": 1.9434, "best_step": 0}, last_loss=1.9433)
    line = names["verdict"](True, 1.7123, 2.4703)
    assert line == "step 250: val loss 1.7123 (-0.2310), 2.47 bits/byte, best"
    assert names["verdict"](False, 2.0) == "step 250: val loss 2.0000 (+0.0567), best 1.9434 at step 0"
    names.update(last_loss=None)
    names["run"].update(best=math.inf)
    assert names["verdict"](False, math.nan) == "step 250: val loss nan"


@pytest.mark.deep
def test_a_terminal_shows_one_line_that_moves(corpus, tmp_path):
    """The rows that stay are the lines of evaluations, samples and the end. The other bytes are the steps."""
    ours, theirs = os.openpty()
    process = start(command(corpus, tmp_path / "o", "--max_iters=20", "--log_interval=1"), stdout=theirs)
    os.close(theirs)
    written = b""
    while chunk := readable(ours):
        written += chunk
    assert process.wait(60) == 0
    written = written.decode().replace("\r\n", "\n")
    rows = screen(written)
    assert len(re.findall(r"\rstep +\d+/20  loss [\d.]+  [\d,]+ tokens/s  0:00:\d\d left", written)) >= 17
    assert not [row for row in rows if "/20" in row] and sum("val loss" in row for row in rows) == 4
    assert max(map(len, written.replace("\n", "\r").split("\r"))) < 200 and rows[-2].startswith("next: ")


def readable(fd):
    try:
        return os.read(fd, 65536)
    except OSError: # the other end is closed
        return b""


@pytest.mark.deep
def test_a_long_run_says_how_long_it_will_take(corpus, tmp_path):
    """By a clock that runs 100,000 times as fast, after a few steps. A short run says nothing."""
    fast = "import time\nnow = time.monotonic\ntime.monotonic = lambda: 1e5 * now()"
    done = ended(spoiled(fast, corpus, tmp_path / "o", "--max_iters=30", "--eval_iters=1"))
    assert len(re.findall(r"^this run takes about .*\d:\d\d:\d\d hours, evaluations", done.stdout, re.M)) == 1
    assert done.stdout.index("this run takes") < done.stdout.index("step      5/30")
    left = [float(words.replace(",", "")) for words in re.findall(r"([\d,]+) s left$", done.stdout, re.M)]
    assert left[-1] > 0 # the last evaluation is still to come
    assert "this run takes" not in train(corpus, tmp_path / "p", "--max_iters=30", "--eval_iters=1").stdout
