"""train.py where memory runs out: the line it ends with, and smaller micro-batches with --auto_batch."""
import pytest

from model import load_checkpoint
from test_distributed import started, store_of_torchrun # noqa: F401  a fixture
from test_distributed import ended as all_ended
from test_train import spoiled, unsettled

# Memory runs out in forwards of more than `rows` sequences, from call number `first` on, after random numbers
# were drawn. kind: the error.
FAILS = """
import model, torch
real, calls = model.GPT.forward, [0]
def forward(self, idx, *a, **k):
    calls[0] += self.training
    out = real(self, idx, *a, **k)
    if len(idx) > {rows} and calls[0] >= {first}:
        {kind}
    return out
model.GPT.forward = forward
"""
KINDS = {"cpu": "torch.empty(2**50)", "cuda": "raise torch.OutOfMemoryError('CUDA out of memory. Tried')",
         "python": "raise MemoryError", "c++": "raise RuntimeError('std::bad_alloc')"}


def failing(rows, first=0, kind="cuda"):
    return FAILS.format(rows=rows, first=first, kind=KINDS[kind])


# --- the line ---


@pytest.mark.parametrize("kind", ["cpu", *(pytest.param(k, marks=pytest.mark.deep) for k in list(KINDS)[1:])])
def test_out_of_memory_ends_with_the_settings_that_need_less(kind, corpus, tmp_path):
    flags = "--max_iters=9", "--checkpoint_interval=3", "--sample_tokens=0"
    done = spoiled(failing(1, 5, kind), corpus, tmp_path / "o", *flags)
    lines = unsettled(done.stderr)
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: out of memory at step 4") and "of 32 tokens" in lines[0]
    assert "--batch_size=2 --gradient_accumulation_steps=2" in lines[1] and "--block_size" in lines[1]
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["step"] == 3


@pytest.mark.deep
def test_several_processes_end_with_one_line(corpus, tmp_path):
    alone = "\nif os.environ['RANK'] == '1':" + failing(1, 5).replace("\n", "\n    ")
    ends = all_ended(started(2, corpus, tmp_path / "o", "--max_iters=9", code=alone), 2)
    assert sum("out of memory at step 4" in err for _, err in ends) == 1, ends
    assert sum(len(err.splitlines()) for _, err in ends) == 2, ends
