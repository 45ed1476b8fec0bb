"""Shared by all tests. On the CPU, unless `pytest -m gpu` asks for a GPU.

`python -m pytest` touches every file, variant and command, within three minutes on two cores. A test that
takes longer and has a short sibling, for instance the run that is killed 20 times beside the one that is
killed 3 times, is marked deep and runs with `python -m pytest -m deep`. processes.py runs the commands.
"""
import os
import random
import sys
from pathlib import Path

import pytest

from processes import ROOT

sys.path.insert(0, str(ROOT)) # however pytest is started
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# a second thread only slows models as small as these; torch reads it now
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "deep: takes long; run with `pytest -m deep`")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; run with `pytest -m gpu`")


def pytest_collection_modifyitems(config, items):
    """A test marked deep or gpu runs only when -m names its mark, or when it is asked for by its own name."""
    chosen = config.getoption("-m") or ""
    by_name = any("::" in word for word in config.args)
    slow = [item for item in items if "deep" in item.keywords and "deep" not in chosen and not by_name]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    for item in items:
        if "gpu" in item.keywords and "gpu" not in chosen:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: pytest -m gpu"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN instead of whatever lay in memory: reading what nobody wrote shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made if kwargs.get("dtype") == torch.int64 else made.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with play.txt, a text of few words, prepared as data/play."""
    from data import prepare

    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    words = ["to be", "or not", "that is", "the question", "thou art", "\n"]
    (folder / "play.txt").write_text(" ".join(rng.choice(words) for _ in range(1500)), encoding="utf-8")
    prepare(folder / "play.txt", data_dir=folder / "data")
    return folder


@pytest.fixture
def mirror():
    """The folder of DATA_MIRROR, or a skip that says what is missing."""
    folder = os.environ.get("DATA_MIRROR")
    if not folder or not os.path.exists(os.path.join(folder, "tinyshakespeare.txt")):
        pytest.skip("DATA_MIRROR does not name a folder with tinyshakespeare.txt")
    return Path(folder)
