"""bench.py eval: each token once, brute force, transformers' loss, and lm-evaluation-harness item by item."""
import json
import math
import random
import statistics

import numpy as np
import pytest
import torch

import bench
import data
from configurator import UserError
from model import GPT, GPTConfig, export_hf
from processes import ROOT, run

TEXT = "no one knows, né, who woke the crow; a cow sank on new snow\n" * 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"device": "cpu", "batch_size": 3, "stride": -1, "field": ""}.items():
        monkeypatch.setattr(bench, name, value)


def rough(**config):
    """A model of large random weights, so that its probabilities differ."""
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "norm": "layernorm", **config}
    model = GPT(GPTConfig(**config)).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def log_probability(model, before, token):
    """Of one token after the ids before it, by one forward of these alone."""
    with torch.no_grad():
        logits = model(torch.tensor([[*map(int, before)]]))[0][0, -1] # (V,)
    return logits.double().log_softmax(-1)[int(token)].item()


def figures(found):
    return {figure["name"].rpartition(", ")[2]: figure["value"] for figure in found}


@pytest.mark.parametrize("context, step", [(8, 8), (8, 4), (8, 1), (7, 3), (1, 1), (50, 25)])
def test_every_target_is_scored_once_with_enough_context(context, step):
    rng = np.random.default_rng(0)
    texts = [*map(np.arange, rng.integers(0, 40, size=20))]
    seen = [[] for _ in texts]
    # Texts are told apart by their hundreds. An id says its own place.
    for x, y in bench.strided([100 * i + ids for i, ids in enumerate(texts)], context, step):
        assert x.shape == y.shape and len(x) <= 3 and x.size(1) <= context
        for window, targets in zip(x.tolist(), y.tolist()):
            for t, target in enumerate(targets):
                if target >= 0:
                    assert window[: t + 1] == [*range(target - t - 1, target)] # all that is before, in order
                    assert t + 1 >= context - step + 1 or target % 100 == t + 1
                    seen[target // 100].append(target % 100)
    assert seen == [[*range(1, len(ids))] for ids in texts]


def test_windows_that_do_not_overlap_are_those_of_train_py():
    """Of several rows and shards too: as batches from Tokens.windows, up to their order."""
    shards = [np.arange(60), np.arange(100, 190), np.arange(200, 203)]
    tokens = data.Tokens(shards, 300, "val", [20, 0, 3])
    rows = [ids for shard, n in zip(shards, tokens.rows) for ids in np.split(shard, range(n, len(shard), n))]

    def targets(batches):
        return sorted((a, b) for x, y in batches for a, b in zip(x.tolist(), y.tolist()))

    assert targets(bench.strided(rows, 8, 8)) == targets(tokens.windows(8, 4))


@pytest.mark.parametrize("stride, begins", [
    (-1, lambda t: 0 if t <= 16 else 8 * math.ceil((t - 16) / 8)), (0, lambda t: (t - 1) // 16 * 16)])
def test_losses_are_those_of_brute_force(tmp_path, monkeypatch, stride, begins):
    """A target at place t is predicted from the window that begins at begins(t), one forward each."""
    codec = data.make_tokenizer("char", TEXT)
    model = rough(vocab_size=codec.vocab_size)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = {"data_dir": str(tmp_path), "dataset": "x"}
    monkeypatch.setattr(bench, "opened", lambda path: (path, model, codec, settings))
    monkeypatch.setattr(bench, "stride", stride)
    found = figures(bench.evaluate("a run", str(tmp_path / "text.txt")))
    ids = codec.encode(TEXT)
    want = -statistics.mean(log_probability(model, ids[begins(t) : t], ids[t]) for t in range(1, len(ids)))
    assert abs(found["loss"] - want) < 1e-5 and abs(found["perplexity"] / math.exp(want) - 1) < 1e-5
    size = len(TEXT.encode()) - 1 # the first character is only context
    bits = want * (len(TEXT) - 1) / math.log(2)
    assert size > len(TEXT) and abs(found["bits per byte"] - bits / size) < 1e-5


def test_documents_and_the_validation_split(corpus, tmp_path, monkeypatch):
    """Documents are joined as prepare does it; without a text, the loss of train.py's windows."""
    dataset = data.load("play", corpus / "data")
    model = rough(vocab_size=dataset.vocab_size)
    settings = {"data_dir": str(corpus / "data"), "dataset": "play", "val_fraction": 0.1}
    monkeypatch.setattr(bench, "opened", lambda path: (path, model, dataset.tokenizer, settings))
    monkeypatch.setattr(bench, "stride", 0)
    with torch.no_grad():
        want = bench.loss_on(model, dataset.val.windows(16, 5))
    assert abs(figures(bench.evaluate("a run"))["loss"] - want) < 1e-6
    (tmp_path / "d.jsonl").write_text('{"body": "to be"}\n{"body": "or not"}\n', encoding="utf-8")
    (tmp_path / "e.txt").write_text("to be\nor not", encoding="utf-8")
    asked = [{"body": text, "endings": ["a", "b"], "label": 0} for text in ("to be", "or not")]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    (tmp_path / "f.txt").write_text("7", encoding="utf-8")
    monkeypatch.setattr(bench, "field", "body")
    one = figures(bench.evaluate("a run", str(tmp_path / "d.jsonl")))
    assert one == figures(bench.evaluate("a run", str(tmp_path / "g.jsonl"))) # questions, but a field is asked
    monkeypatch.setattr(bench, "field", "")
    assert one == figures(bench.evaluate("a run", str(tmp_path / "e.txt"))) and one["loss"] > 0
    for words, message in ({(str(tmp_path / "f.txt"),): "characters lacks '7'", ("shakespeare",): "no text",
                            ("recall",): "config/train_recall.py"}).items():
        with pytest.raises(UserError, match=message):
            list(bench.evaluate("a run", *words))
    monkeypatch.setattr(bench, "stride", 17)
    with pytest.raises(UserError, match="at most 16"):
        list(bench.evaluate("a run"))


def asked(rng, count, words, longest):
    """Made-up questions. Some contexts end with spaces, some are longer than a model's context."""
    def phrase(most):
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    contexts = [phrase(longest) + " " * rng.choice([0, 0, 1, 2]) for _ in range(count)]
    choices = [[phrase(4) for _ in range(rng.choice([2, 4]))] for _ in range(count)]
    return [{"query": context, "choices": some, "gold": rng.randrange(len(some))}
            for context, some in zip(contexts, choices)]


def test_multiple_choice_is_that_of_brute_force(tmp_path, monkeypatch):
    codec = data.make_tokenizer("char", TEXT)
    model, rng = rough(vocab_size=codec.vocab_size), random.Random(0)
    lines = asked(rng, 12, ["no", "crow", "né", "woke"], 5)
    lines.append({"query": "", "choices": ["a", "cow"], "gold": 1})
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {"data_dir": str(tmp_path), "dataset": "x"}
    monkeypatch.setattr(bench, "opened", lambda path: (path, model, codec, settings))
    rows = list(bench.evaluate("a run", str(path)))
    by_sum, by_length = [], []
    for line in lines:
        sums = []
        for choice in line["choices"]:
            before, whole = line["query"].rstrip() or "\n", f"{line['query'] or chr(10)} {choice}"
            kept, new = codec.encode(whole)[-17:], len(whole) - len(before)
            sums.append(sum(log_probability(model, kept[:t], kept[t])
                            for t in range(max(1, len(kept) - new), len(kept))))
        by_sum.append(sums)
        by_length.append([s / len(choice) for s, choice in zip(sums, line["choices"])])
    found = [(line["query"], line["choices"], line["gold"]) for line in lines]
    texts = [bench.ending_ids(codec, context, ending) for context, endings, _ in found for ending in endings]
    with torch.no_grad():
        got = bench.log_likelihoods(model, texts, 16)
    assert np.abs(got - np.concatenate(by_sum)).max() < 1e-4
    assert {bool(line["query"].endswith(" ")) for line in lines} == {True, False}
    for scores, (accuracy, error) in zip((by_sum, by_length), (rows[:2], rows[2:4])):
        hits = [100.0 * (max(s) == s[line["gold"]]) for s, line in zip(scores, lines)]
        assert accuracy["value"] == pytest.approx(statistics.mean(hits)) and 0 < accuracy["value"] < 100
        assert error["value"] == pytest.approx(statistics.stdev(hits) / 13 ** 0.5)


OWN = {"activity_label": "Rest", "ctx_a": "He sat [step]  down.", "ctx_b": "then he", "ctx": "not this",
       "endings": ["sat [title] slept ", " rose [substeps] up."], "label": "0"} # as in HellaSwag's own file


def test_questions_in_three_forms_and_none(tmp_path):
    def read(*lines):
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return bench.questions(str(tmp_path / "q.jsonl"))

    want = [("He sat", ["down.", "up."], 1)]
    assert read({"ctx": "He sat", "endings": ["down.", "up."], "label": 1}) == want
    assert read({"query": "He sat", "choices": ["down.", "up."], "gold": "1"}) == want
    assert read(OWN) == [("Rest: He sat  down. Then he", ["sat. slept", "rose up."], 0)]
    assert read({"text": "a document"}) == [] and bench.questions(str(ROOT / "README.md")) == []
    for wrong in ({"label": 2}, {"endings": []}, {"endings": ["a", ""]}, {"label": ""}, {"ctx": None}):
        with pytest.raises(UserError, match="line 1 is no question"):
            read({"ctx": "He sat", "endings": ["down.", "up."], "label": 1, **wrong})


class Finder(torch.nn.Module):
    """Says the digit that stood after a letter before, if it is in its window; else always 0."""
    block_size = 64

    def __init__(self, codec, memory=None):
        super().__init__()
        self.codec, self.memory = codec, memory

    def forward(self, idx, targets):
        guess = torch.full_like(idx, int(self.codec.encode("0")[0]))
        for b, line in enumerate(idx.tolist()):
            said = {}
            for t, token in enumerate(line):
                guess[b, t] = said.get(token, guess[b, t])
                if t:
                    said[line[t - 1]] = token
        return torch.nn.functional.one_hot(guess, self.codec.vocab_size).float(), {}


def test_recall_by_distance():
    codec = data.make_tokenizer("char", "abcdefgh0123456789.\n")
    lines = [line for line in data.recall("")[1][1014:]] # the last hundredth, without a line that is cut
    back, right = [], []
    for line in lines:
        for t in range(0, 1022, 2):
            back.append(next((t - s for s in range(t - 2, -1, -2) if line[s] == line[t]), 0))
            right.append(line[t + 1] == "0")

    def ask(model):
        return {f["name"]: f["value"] for f in bench.recall("a run", model, codec, {"val_fraction": 0.01})}

    rows = ask(Finder(codec))
    near, far = (sum(low < d <= high for d in back) for low, high in ((0, 32), (64, 128)))
    assert rows[f"1 to 32 back, {near:,} answers"] == 100.0
    unseen = [r for d, r in zip(back, right) if 64 < d <= 128] # never in a window: right where it is a 0
    assert rows[f"65 to 128 back, {far:,} answers"] == pytest.approx(100 * statistics.mean(unseen))
    rows = ask(Finder(codec, memory=True))
    beyond = sum(d > 64 for d in back)
    assert rows[f"recall of {beyond:,}, with memory"] == 100.0 and rows["each window by itself"] < 25
    assert rows[f"65 to 128 back, {far:,} answers"] == 100.0


@pytest.mark.deep
def test_a_run_of_train_py_has_the_loss_that_it_printed(tmp_path):
    """Through both command lines; settings stand before, between and after the words."""
    (tmp_path / "text.txt").write_text(TEXT * 8, encoding="utf-8")
    flags = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --max_iters=4 --eval_interval=2"
    flags += " --warmup_iters=1 --dataset=text.txt --out_dir=out/a"
    done = run([ROOT / "train.py", *flags.split()], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    want = bench.evaluations(tmp_path / "out/a")[-1]["val_loss"]
    text = "".join(reversed(TEXT))
    (tmp_path / "back.txt").write_text(text, encoding="utf-8")
    words = "eval out/a/ckpt.pt --stride 0"
    done = run([ROOT / "bench.py", "--rounds=1", *words.split(), "--save=false"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["suite"] == "eval" and abs(last["results"][0]["value"] - want) < 1e-6
    done = run([ROOT / "bench.py", "eval", "out/a", "--stride=4", "back.txt"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = figures(json.loads(done.stdout.splitlines()[-1])["results"])
    assert last["predicted"] == len(text.encode()) - 1 and last["loss"] > 0


# --- against other libraries ---


@pytest.fixture
def pair(tmp_path):
    """(our Llama, transformers' of equal weights, our tokenizer, transformers', made-up words)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

    rng = random.Random(0)
    words = ["".join(rng.choice("aeknost") for _ in range(rng.randint(1, 6))) for _ in range(60)]
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_next")
    codec.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=53, special_tokens=["<|endoftext|>"],
                                             show_progress=False)
    codec.train_from_iterator([" ".join(rng.choice(words) for _ in range(4000))], trainer)
    assert codec.get_vocab_size() == 53
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=codec, eos_token="<|endoftext|>")
    model = GPT(GPTConfig(vocab_size=53, block_size=64, n_layer=4, n_embd=64, n_head=4, n_kv_head=2, glu=True,
                          activation="silu", init_std=0.2)).eval()
    export_hf(model, tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    return model, theirs, data.HFTokenizer(codec.to_str()), fast, words


@pytest.mark.deep
def test_the_loss_is_transformers_own(pair, tmp_path):
    model, theirs, codec, fast, words = pair
    _, again, _, settings = bench.opened(str(tmp_path / "theirs")) # the folder that transformers reads
    assert not settings and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    rng = random.Random(1)
    text = " ".join(rng.choice(words) for _ in range(300))
    ids = fast(text, return_tensors="pt").input_ids[0]
    got = figures(bench.losses_of("x", [codec.encode(text)], model, codec, 32, 32))
    with torch.no_grad():
        parts = [ids[i : i + 33][None] for i in range(0, len(ids) - 1, 32)]
        sums = [theirs(part, labels=part).loss.item() * (part.size(1) - 1) for part in parts]
    want = sum(sums) / (len(ids) - 1)
    assert abs(got["loss"] - want) < 1e-4
    assert abs(got["bits per byte"] - want * (len(ids) - 1) / math.log(2) / len(fast.decode(ids[1:]))) < 1e-4


@pytest.mark.deep
def test_lm_evaluation_harness_agrees_item_by_item(pair, tmp_path, monkeypatch, capsys):
    """Log-probabilities within 1e-4, each answer, both accuracies and their errors, on 200 questions."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm-eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag import utils as hellaswag

    model, theirs, codec, fast, words = pair
    path = tmp_path / "asked.jsonl"
    lines = asked(random.Random(2), 200, words, 40)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = {"task": "made_up", "dataset_path": "json", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"validation": str(path)}}, "validation_split": "validation",
            "doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "doc_to_choice": "choices",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True}
                            for m in ("acc", "acc_norm")]}
    judge = HFLM(pretrained=theirs, tokenizer=fast, max_length=64, batch_size=8, device="cpu")
    told = lm_eval.simple_evaluate(model=judge, tasks=[task], log_samples=True)
    found = bench.questions(str(path))
    texts = [bench.ending_ids(codec, context, ending) for context, endings, _ in found for ending in endings]
    with torch.no_grad():
        ours = bench.log_likelihoods(model, texts, 64)
        rows = list(bench.multiple_choice("x", found, model, codec, 64))
    samples = sorted(told["samples"]["made_up"], key=lambda sample: sample["doc_id"])
    want = np.array([float(answer[0]) for sample in samples for answer in sample["filtered_resps"]])
    gap = np.abs(ours - want).max()
    cut = sum(len(ids) > 65 for ids, _ in texts)
    assert gap < 1e-4 and want.std() > 1 and cut > 20
    scores = iter(ours)
    for (_, endings, right), sample in zip(found, samples):
        sums = np.array([next(scores) for _ in endings])
        assert (sums.argmax() == right, (sums / [*map(len, endings)]).argmax() == right) == (
            sample["acc"] == 1, sample["acc_norm"] == 1)
    own = hellaswag.process_docs(type("", (), {"map": staticmethod(lambda process: process(OWN))}))
    assert bench.question(OWN) == (own["query"], own["choices"], own["gold"])
    result = told["results"]["made_up"]
    for row, key in zip(rows, ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")):
        assert abs(row["value"] - 100 * result[f"{key},none"]) < 1e-9
    with capsys.disabled():
        print(f"\nlm_eval {lm_eval.__version__}: {len(want)} endings, {cut} cut, largest gap {gap:.1e}"
              f", accuracies {result['acc,none']}, {result['acc_norm,none']}")
