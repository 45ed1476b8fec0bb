"""processes.py: a fork of the server shows what a real interpreter shows."""
import os
import signal
import subprocess

import pytest

from processes import run, start

PROGRAMS = {
    "ends": "print('done')",
    "code": "import sys; sys.exit(7)",
    "words": "import sys; sys.exit('a sentence')",
    "traceback": "print('before', end=''); [][0]",
    "hook": "import sys\nsys.excepthook = lambda *error: sys.exit(3)\n1 / 0",
    "exit functions": "import atexit; atexit.register(print, 'last'); print('first'); raise SystemExit(4)",
    "thread": "import threading, time\n"
              "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "surroundings": "import os, sys\n"
                    "print(sys.argv[1:], os.getcwd(), os.environ['A'], 'B' in os.environ, input())",
    "streams": "import sys\n"
               "for s in (sys.stdin, sys.stdout, sys.stderr): print(s.encoding, s.errors, s.isatty())",
    "buffered": "import os, sys; sys.stdout.write('second'); os.write(1, b'first ')",
    "closed": "import os; os.close(1); print('to nobody')",
    "own modules": "import sys; print({'configurator', 'kernels', 'model', 'data'} & set(sys.modules))",
    "signals": "import signal; print([signal.getsignal(n) for n in (2, 13, 15, 17)])",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "interrupted": "raise KeyboardInterrupt"}


@pytest.mark.deep
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_is_as_an_interpreter(name, tmp_path, monkeypatch):
    monkeypatch.setenv("B", "1")
    (tmp_path / "program.py").write_text(PROGRAMS[name], encoding="utf-8")
    how = {"cwd": tmp_path, "env": {"A": "1", "B": None}, "input": "a line\n"}
    ours, theirs = (run(["program.py", "x", "y"], fresh=fresh, **how) for fresh in (False, True))
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    last = [done.stderr.splitlines()[-1:] for done in (ours, theirs)]
    assert last[0] == last[1] and ours.stderr.count("\n") >= theirs.stderr.count("\n") # a traceback is longer


def test_what_was_read_before_the_fork_takes_an_interpreter():
    shown = ["-c", "import sys; print(sys.flags.utf8_mode, 'numpy' in sys.modules)"]
    assert run(shown, env={"PYTHONUTF8": "1"}).stdout == "1 False\n"
    assert run(shown).stdout.endswith(" True\n")


def test_a_live_process_takes_lines_and_signals():
    process = start(["-c", "import sys\nfor line in sys.stdin: print('heard', line.strip(), flush=True)"])
    process.stdin.write("one\n")
    process.stdin.flush()
    assert process.stdout.readline() == "heard one\n" and process.returncode is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGTERM
    process.kill() # it has ended: another process may have its id by now
    with pytest.raises(subprocess.TimeoutExpired):
        run(["-c", "import time; time.sleep(60)"], timeout=0.1)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_the_server_starts_no_threads():
    """Else a lock that another thread held at the fork would stay locked in the fork for ever."""
    code = """import os
server = open(f"/proc/{os.getppid()}/stat").read().split()[3] # the parent's parent
print(len(os.listdir(f"/proc/{server}/task")))"""
    assert run(["-c", code]).stdout == "1\n"
