"""Runs the project's scripts for the tests: run() waits for the end, start() returns the living process.

Importing torch takes seconds, and a test of a message needs no more than a moment after it. So one process,
the server, imports torch once and then forks for every command. The fork gets the arguments, folder,
environment and streams of the command and runs the script as an interpreter would. Python, torch and numpy
are shared; the project's own modules are imported anew, because importing configurator has effects. A command
starts in a real interpreter where fresh=True asks for it, where it changes a variable that is read before the
fork, and on Windows.
"""
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python, OpenMP, torch and triton have read these when the server forks.
ONE_AT_A_TIME = threading.Lock() # commands may be started from several threads
READ_EARLY = ("PYTHON", "LC_", "LANG", "OMP_", "GOMP_", "MKL_", "TORCH", "TRITON")


def run(argv, input=None, timeout=120, **how):
    """[script or "-c", code, arguments ...] run to its end: an object with returncode, stdout and stderr."""
    process = start(argv, stdin=subprocess.DEVNULL if input is None else subprocess.PIPE, **how)
    out, err = process.communicate(input, timeout)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def two_at_a_time(request, jobs):
    """{id of a test: function} -> {id: the future of its result}, for the tests of this module that run."""
    chosen = [item for item in request.session.items if item.path == request.path]
    chosen = {item.callspec.id for item in chosen if hasattr(item, "callspec")}
    pool = ThreadPoolExecutor(2)
    futures = {name: pool.submit(job) for name, job in jobs.items() if name in chosen}
    pool.shutdown(wait=False)
    return futures


def start(argv, cwd=ROOT, env={}, fresh=False, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          stderr=subprocess.PIPE):
    """The running process. env: changes to this environment; None takes a variable away. Streams are text."""
    argv = [str(word) for word in argv]
    changed = {"CC": remembering_compiler(), "PYTHONUNBUFFERED": None, **env}
    early = [name for name in env if name.startswith(READ_EARLY) and env[name] != os.environ.get(name)]
    everything = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    if not fresh and not early and hasattr(os, "fork"):
        return Forked(argv, cwd, everything, (stdin, stdout, stderr))
    return subprocess.Popen([sys.executable, *argv], cwd=cwd, env=everything, text=True, encoding="utf-8",
                            stdin=stdin, stdout=stdout, stderr=stderr)


@cache
def remembering_compiler():
    """A CC that compiles each text once and copies the library after that, which saves 1 to 3 s a time."""
    compiler, made = os.environ.get("CC", "cc"), tempfile.mkdtemp(prefix="compiled")
    script = os.path.join(made, "cc")
    with open(script, "w", encoding="utf-8") as file:
        file.write(f"""#!/bin/sh
for word; do case $word in *.c) text=$word;; *.so) library=$word;; esac; done
key=$(echo "$*" | sed "s|$(dirname "$library")||" | cat - "$text" | cksum | tr " " -)
[ -f "{made}/$key" ] && exec cp "{made}/$key" "$library"
{compiler} "$@" && cp "$library" "{made}/$key.$$" && mv "{made}/$key.$$" "{made}/$key"
""")
    os.chmod(script, 0o700)
    return script


class Forked:
    """A fork of the server, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, argv, cwd, env, streams):
        self.args, self.returncode, theirs = argv, None, []
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            ours = None
            if stream == subprocess.PIPE:
                reading, writing = os.pipe()
                mine, stream = (writing, reading) if name == "stdin" else (reading, writing)
                ours = open(mine, "w" if name == "stdin" else "r", encoding="utf-8", newline="\n")
            elif stream == subprocess.DEVNULL:
                stream = os.open(os.devnull, os.O_RDWR)
            else: # the caller keeps its own
                stream = os.dup(stream if isinstance(stream, int) else stream.fileno())
            setattr(self, name, ours)
            theirs.append(stream)
        control, end = socket.socketpair()
        with ONE_AT_A_TIME:
            socket.send_fds(server(), [b"."], [*theirs, end.fileno()])
        end.close()
        for fd in theirs:
            os.close(fd)
        control.sendall(json.dumps([argv, os.path.abspath(cwd), env]).encode())
        control.shutdown(socket.SHUT_WR)
        self.control = control.makefile() # of two lines: the id of the process, and how it ended
        self.pid = int(self.control.readline())

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.control], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self.control.readline()))
            self.control.close()
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=None):
        """Writes input; returns what is left of stdout and stderr. Kills what outlasts the timeout."""
        with ThreadPoolExecutor(3) as pool: # threads, because the process waits where a pipe is full
            out, err = (pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr))
            if self.stdin:
                pool.submit(lambda: (self.stdin.write(input or ""), self.stdin.close()))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return out and out.result(), err and err.result()


@cache
def server():
    """The socket of the server, which is started with the first command and ends when this process does."""
    ours, theirs = socket.socketpair()
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                     pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return ours


def serve(connection):
    """Forks once for each message and returns in the forks alone, which are ready to run sys.argv."""
    import multiprocessing # noqa: F401
    import numpy # noqa: F401
    import requests # noqa: F401
    import torch._dynamo # noqa: F401  the first optimizer imports it
    with contextlib.suppress(ImportError): # no triton on this platform
        import triton.language # noqa: F401
    gc.freeze() # no fork's collector looks through these objects again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # nobody waits for the guards
    while True:
        fds = socket.recv_fds(connection, 1, 4)[1]
        if not fds: # the tests have ended: nothing that they started lives on
            os.killpg(0, signal.SIGKILL)
        if not os.fork():
            break
        for fd in fds:
            os.close(fd)
    connection.close()
    control = socket.socket(fileno=fds.pop())
    command, folder, environment = json.load(control.makefile())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if not process:
        control.close()
        return become(command, folder, environment, fds)
    for fd in fds:
        os.close(fd)
    control.sendall(f"{process}\n".encode()) # the guard tells how the process ends, whatever ends it
    control.sendall(f"{os.waitpid(process, 0)[1]}\n".encode())
    os._exit(0)


def become(command, folder, environment, fds):
    """This process, as an interpreter has it when it begins to run a script."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        kind = getattr(sys, name)
        stream = open(fd, mode, encoding=kind.encoding, errors=kind.errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stderr.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler) # a server in the background would ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = command, os.path.dirname(os.path.abspath(command[0]))


def exit_code(script):
    """Runs the script; returns the exit code that it has in an interpreter, which gets Ctrl-C itself."""
    try:
        if script == "-c":
            exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        raise
    except SystemExit as stop:
        return stop.code
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as stop: # configurator's hook ends a person's mistake so
            return stop.code
        return 1
    return 0


def leave_at_once():
    """The last exit function: taking the modules apart, as an interpreter does, would cost 0.3 s."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError): # the interpreter finds the code for that
        return
    if type(code) is int:
        os._exit(code & 255)


if __name__ == "__main__":
    code = None
    atexit.register(leave_at_once) # the first to be registered is the last to be called
    serve(socket.socket(fileno=int(sys.argv[1])))
    code = exit_code(sys.argv[0])
    sys.exit(code)
