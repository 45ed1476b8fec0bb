"""
Operations written close to the machine, each tested against the plain PyTorch that says what it computes.

For the CPU they are C, compiled at first use by the system's compiler (CC, else cc; half a second) and called through
ctypes. C because each is one walk through memory: the loops that torch.compile makes of the same formulas read the gradient
twice, recompute square roots, and take 15 to 35 s to compile for a model's list of tensors.
"""
import ctypes
import functools
import os
import shlex
import subprocess
import tempfile

import torch


@functools.cache
def c_library(source):
    """The C source as a ctypes library; None, said once, where there is no compiler. With OpenMP where the compiler has it."""
    with tempfile.TemporaryDirectory() as folder: # Unix keeps a loaded library when its file goes
        text, library = os.path.join(folder, "kernels.c"), os.path.join(folder, "kernels.so")
        with open(text, "w", encoding="utf-8") as f:
            f.write(source)
        # errno and traps would keep sqrt and sums from being vectorised; the arithmetic stays IEEE's
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", text, "-o", library, "-lm"]
        compiler = shlex.split(os.environ.get("CC", "cc"))
        for more in (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], []): # Apple's clang has no OpenMP, some no native
            try:
                done = subprocess.run([*compiler, *more, *flags], capture_output=True)
            except OSError: # there is none
                break
            if done.returncode == 0:
                return ctypes.CDLL(library)
    print(f"NO WORKING C COMPILER ({shlex.join(compiler)}; CC names another): what would be C runs as plain PyTorch, several times slower")
    return None


def c_array(kind, values):
    return (kind * len(values))(*values)


def pointers(tensors, offsets=None):
    """Addresses of fp32 tensors, each moved on by a number of elements."""
    offsets = offsets or [0] * len(tensors)
    return c_array(ctypes.c_void_p, [t.data_ptr() + 4 * n for t, n in zip(tensors, offsets)])


def integers(values):
    return c_array(ctypes.c_int64, values)


def floats(values):
    return c_array(ctypes.c_float, values)


def threads():
    return ctypes.c_int(torch.get_num_threads())
