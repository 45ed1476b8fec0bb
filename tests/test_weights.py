"""Weights out and in: files of transformers, of nanoGPT, and our own without the optimizer.

transformers is the judge: it loads what we export, writes what we import, and both must compute one function.
"""
import json
import os
import re

import pytest
import torch

import data
import model as M
from conftest import ROOT
from model import GPT, GPTConfig
from processes import run

transformers = pytest.importorskip("transformers", reason="transformers is not installed; only tests use it")
pytest.importorskip("safetensors")
deep = pytest.mark.deep

LLAMA = dict(n_embd=64, mlp_hidden=96, n_head=4, activation="silu", glu=True, tie_embeddings=False)
GPT2 = dict(n_embd=64, n_head=4, norm="layernorm", position="learned", activation="gelu_tanh", bias=True)
OURS = { # one of each family, and of what its config.json can say
    "gpt2": GPT2,
    "gpt2 without biases": {**GPT2, "bias": False, "activation": "gelu", "tie_embeddings": False,
                            "norm_eps": 1e-3},
    "llama": LLAMA,
    "llama, one key head, tied": {**LLAMA, "n_kv_head": 1, "tie_embeddings": True, "norm_eps": 1e-3,
                                  "rope_base": 500.0},
    "llama, wide heads": {**LLAMA, "n_kv_head": 2, "head_dim": 32, "activation": "gelu_tanh"},
    "diffllama": {**LLAMA, "n_kv_head": 2, "attention": "diff", "diff_form": "v1", "norm_eps": 1e-5},
    "deepseek_v3": {**LLAMA, "head_dim": 32, "attention": "mla", "kv_rank": 20, "rope_dim": 8},
    "deepseek_v3, low rank": {**LLAMA, "attention": "mla", "q_rank": 24, "n_ahead": 3, "uncertainty": True},
}
TEXT = "To be, or not to be: that is the question.\n  Thou art\tso   fair; isn't it? 12345 a's -- \n\nO!"


def ours(**config):
    """A model with gains away from 1 and lambdas away from their start."""
    model = GPT(GPTConfig(**{"vocab_size": 53, "block_size": 256, "n_layer": 3, **config}))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def same_function(model, theirs, greedy=0):
    """One text's logits, and the greedy continuation, by both caches."""
    idx = torch.randint(model.config.vocab_size, (2, 32))
    with torch.no_grad():
        want, got = theirs.eval()(idx).logits, model.eval()(idx, idx)[0]
    assert want.std() > 0.2 # not a comparison of zeros
    assert (got - want).abs().max() < 1e-4
    if greedy:
        text = theirs.generate(idx, max_new_tokens=greedy, do_sample=False, use_cache=True, pad_token_id=0,
                               attention_mask=torch.ones_like(idx))
        assert text.shape == (2, 32 + greedy)
        assert torch.equal(model.generate(idx, greedy, temperature=0), text)


def parameters_equal(a, b):
    """To the bit, but for what stands beside the trunk: transformers has no place for it."""
    a, b = ({k: w for k, w in model.state_dict().items() if not k.startswith("extras.")} for model in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name, greedy", [("gpt2", 20), ("llama, one key head, tied", 20),
                                          *(pytest.param(name, 200, marks=deep) for name in OURS)])
def test_there_and_back(name, greedy, tmp_path):
    """Ours -> a folder -> transformers -> its own folder -> ours: to the bit, and one function everywhere."""
    model = ours(**OURS[name])
    made = M.export_hf(model, tmp_path / "there")
    theirs, gaps = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there",
                                                                     output_loading_info=True)
    assert not gaps["missing_keys"] and not gaps["unexpected_keys"]
    assert type(theirs).__name__ == made == M.FAMILIES[re.match(r"\w+", name)[0]][0]
    same_function(model, theirs, greedy)
    assert made[:4] != "GPT2" or theirs.config.n_ctx == 256 # by which llama.cpp's converter knows the context
    theirs.save_pretrained(tmp_path / "back")
    back = GPT.from_pretrained(str(tmp_path / "back"))
    if "without" in name: # what had no biases has zeros
        assert all((p == 0).all() for k, p in back.named_parameters() if k.endswith("bias"))
        same_function(back, theirs)
    else:
        parameters_equal(model, back)
        here, there = M.spelled_out(model.config), M.spelled_out(back.config)
        assert {k for k in here if here[k] != there[k]} <= {"n_ahead", "uncertainty"}


def alphabet(text):
    return {char: i for i, char in enumerate(sorted(set(text)))}


def trained_bpe(folder):
    """A tokenizer.json of Hugging Face's own trainer."""
    hf = pytest.importorskip("tokenizers")
    codec = hf.Tokenizer(hf.models.BPE())
    codec.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = hf.decoders.ByteLevel()
    codec.train_from_iterator([TEXT], hf.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>"]))
    codec.save(str(folder / "bpe.json"))
    return str(folder / "bpe.json")


@pytest.mark.parametrize("name", ["char", "ascii", "byte", "hf", pytest.param("gpt2", marks=deep)])
def test_tokenizers_give_our_ids(name, tmp_path, request):
    """AutoTokenizer's ids of the exported folder, and those that the folder gives from_pretrained."""
    data_dir = request.getfixturevalue("mirror") if name == "gpt2" else tmp_path
    kind = trained_bpe(tmp_path) if name == "hf" else name
    codec = data.make_tokenizer(kind, TEXT, tmp_path)
    assert codec.name == name
    model = ours(**LLAMA, vocab_size=max(300, codec.vocab_size))
    model.tokenizer = codec
    M.export_hf(model, tmp_path / "there")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    for text in (TEXT, "thou" if name == "char" else "naïve œuvre 𝄞"):
        want = codec.encode(text).tolist()
        assert theirs(text, add_special_tokens=False).input_ids == want
        assert GPT.from_pretrained(str(tmp_path / "there"), tmp_path).tokenizer.encode(text).tolist() == want
    assert theirs.decode(theirs(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert theirs.eos_token_id == codec.eot
    back = GPT.from_pretrained(str(tmp_path / "there"), tmp_path).tokenizer
    assert back.name == ("gpt2" if name == "gpt2" else "hf")
    if name == "char": # a character that it lacks is named, as by ours
        assert back.unknown("a~€") == codec.unknown("a~€") == ["~", "€"]


THEIRS = {
    "gpt2": ("GPT2", dict(n_positions=64, n_embd=64, n_layer=3, n_head=4, initializer_range=0.2)),
    "llama": ("Llama", dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=dict(
        rope_type="default", rope_theta=500.0))),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, head_dim=8)),
    "diffllama": ("DiffLlama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "deepseek_v3": ("DeepseekV3", dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=20,
                                       qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32,
                                       first_k_dense_replace=3)),
}
SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=64, initializer_range=0.2)


def made_by_transformers(kind, folder, **change):
    name, fields = THEIRS[kind]
    fields = {**(SHAPE if kind != "gpt2" else {}), "vocab_size": 53, **fields, **change}
    torch.manual_seed(3)
    model = getattr(transformers, name + ("LMHeadModel" if kind == "gpt2" else "ForCausalLM"))(
        getattr(transformers, name + "Config")(**fields))
    with torch.no_grad():
        for p in model.parameters(): # biases away from 0, gains away from 1
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_a_checkpoint_of_transformers(kind, tmp_path):
    theirs = made_by_transformers(kind, tmp_path / "a")
    same_function(GPT.from_pretrained(str(tmp_path / "a")), theirs)


def test_shards_and_a_pickle(tmp_path):
    theirs = made_by_transformers("llama", tmp_path / "a")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same_function(GPT.from_pretrained(str(tmp_path / "shards")), theirs)
    os.remove(tmp_path / "a/model.safetensors")
    weights = [*theirs.state_dict().items()]
    for i, part in enumerate((weights[:9], weights[9:])):
        torch.save(dict(part), tmp_path / f"a/pytorch_model-0000{i + 1}-of-00002.bin")
    same_function(GPT.from_pretrained(str(tmp_path / "a")), theirs)
    os.remove(tmp_path / "a/pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="other weights than its settings say: embed_tokens.weight, .* more"):
        GPT.from_pretrained(str(tmp_path / "a"))
    os.remove(tmp_path / "a/pytorch_model-00002-of-00002.bin")
    torch.save(theirs.state_dict(), tmp_path / "a/pytorch_model.bin")
    same_function(GPT.from_pretrained(str(tmp_path / "a")), theirs)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"lm_head.weight": Code()}, tmp_path / "a/pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights and numbers"):
        GPT.from_pretrained(str(tmp_path / "a"))
    assert not (tmp_path / "ran").exists()
    for name, content, words in (("model-00002-of-", b"cut off", "cannot read .*model-00002"),
                                 ("config.json", b"{", "config.json is damaged")):
        next(p for p in (tmp_path / "shards").iterdir() if p.name.startswith(name)).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained(str(tmp_path / "shards"))
    os.remove(tmp_path / "a/pytorch_model.bin")
    with pytest.raises(ValueError, match="has no weights: neither model.safetensors nor pytorch_model.bin"):
        GPT.from_pretrained(str(tmp_path / "a"))


def test_gpt2_by_name_from_the_mirror(tmp_path, monkeypatch):
    theirs = made_by_transformers("gpt2", tmp_path / "a", vocab_size=50257, n_positions=1024, n_embd=8,
                                  n_layer=1, n_head=2)
    file = tmp_path / "gpt2-model.safetensors"
    os.rename(tmp_path / "a/model.safetensors", file)
    revision = M.GPT2["gpt2"][-1]
    note = f"{data.sha256_of(file)} {file.stat().st_size} {revision}"
    (tmp_path / "gpt2-model.safetensors.sha256").write_text(note, encoding="utf-8")
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(M.GPT2, "gpt2", (1, 2, 8, revision))
    model = GPT.from_pretrained("gpt2", str(tmp_path / "data"))
    assert model.tokenizer.name == "gpt2" and model.config.block_size == 1024
    same_function(model, theirs)
    with pytest.raises(data.DownloadError, match="huggingface.co/openai-community/gpt2-xl/resolve/15e"):
        GPT.from_pretrained("gpt2-xl", str(tmp_path / "data"))


REFUSED_IN = { # what a config.json says, and what is heard
    "rope scaling": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
                     "our llama has no rope_type=linear"),
    "rope scaling of old": ("llama", dict(rope_parameters=None, rope_scaling=dict(type="dynamic")),
                            "rope_type=dynamic"),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True), "attention_bias=True, mlp_bias=True"),
    "a window": ("mistral", dict(sliding_window=32), "sliding_window=32"),
    "halves": ("deepseek_v3", dict(rope_interleave=False), "rope_interleave=False"),
    "narrow values": ("deepseek_v3", dict(v_head_dim=16), "our deepseek_v3 has no v_head_dim=16"),
    "an activation": ("llama", dict(hidden_act="relu"), "activation='relu' is not known; choose one of"),
    "a scale": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    "Llama 3.2's rope": ("llama", dict(rope_parameters=None, rope_theta=5e5, rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
        rope_type="llama3")), "our llama has no rope_type=llama3"),
    "rope in words": ("llama", dict(rope_parameters="linear"), "rope_type=linear"),
    "types": ("llama", dict(model_type=["llama"]), "model_type=['llama'] is none"),
    "a list": ("llama", dict(hidden_act=["silu"]), "does not know: activation=['silu']"),
    "a type": ("llama", dict(model_type="qwen2"), "model_type='qwen2' is none of those we have: llama"),
    "no width": ("llama", dict(hidden_size=None), "weight is (53, 64), not (53, 384)"),
    "another size": ("llama", dict(vocab_size=54), "embed_tokens.weight is (53, 64), not (54, 64)"),
    "another depth": ("llama", dict(num_hidden_layers=2), "other weights than its settings say: layers.2"),
    "text for a number": ("llama", dict(hidden_size="64"), "does not know: n_embd='64'"),
}


@pytest.mark.parametrize("what", REFUSED_IN)
def test_what_our_architecture_lacks_is_refused(what, tmp_path):
    kind, change, words = REFUSED_IN[what]
    made_by_transformers(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(str(tmp_path))
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


LLAMA_FILE = dict(architectures=["LlamaForCausalLM"], model_type="llama", bos_token_id=1, eos_token_id=2,
                  hidden_act="silu", hidden_size=64, initializer_range=0.02, intermediate_size=96,
                  num_attention_heads=4, num_hidden_layers=3, vocab_size=53, use_cache=True)
GPT2_FILE = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", initializer_range=0.02, n_embd=64,
                 layer_norm_epsilon=1e-5, n_ctx=64, n_head=4, n_layer=3, resid_pdrop=0.1, vocab_size=53,
                 summary_type="cls_index", task_specific_params={"text-generation": {"do_sample": True}})
FILES = { # public models' config.json in small: kind, what differs in the weights, the file, the context
    "GPT-2 of 2019": ("gpt2", {}, GPT2_FILE, 64), # without n_positions and activation_function
    "GPT-2": ("gpt2", {}, {**GPT2_FILE, "n_positions": 64, "activation_function": "gelu_new"}, 64),
    "Llama 1": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6, rope_parameters=None),
                {**LLAMA_FILE, "max_sequence_length": 2048, "rms_norm_eps": 1e-6, "pad_token_id": 0}, 2048),
    "Llama 3": ("llama", {}, {
        **LLAMA_FILE, "max_position_embeddings": 8192, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 500, "mlp_bias": False, "eos_token_id": [2, 3],
        "tie_word_embeddings": False, "head_dim": None}, 8192),
    "Mistral 0.2": ("mistral", dict(head_dim=16), {
        **LLAMA_FILE, "model_type": "mistral", "max_position_embeddings": 32768, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": None}, 32768),
}


@pytest.mark.parametrize("name", FILES)
def test_public_config_files(name, tmp_path):
    """Fields may be missing, null, of another time's name, or whole where ours are fractions."""
    kind, change, config, context = FILES[name]
    theirs = made_by_transformers(kind, tmp_path, **change)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = GPT.from_pretrained(str(tmp_path))
    assert model.config.block_size == context
    same_function(model, theirs)


def test_experts_are_refused(tmp_path):
    made_by_transformers("deepseek_v3", tmp_path, first_k_dense_replace=1, n_routed_experts=4, n_group=1,
                         topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8)
    with pytest.raises(ValueError, match="has other weights than its settings say: .*layers.1.mlp.experts.0"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("change, words", [
    (dict(conv=4, residual="mhc"), "LlamaForCausalLM, lacks conv=4, residual=mhc"),
    (dict(qk_norm=True), "lacks qk_norm=True"),
    (dict(activation="telu"), "lacks activation=telu"),
    (dict(glu=False, thought_tokens=2), "lacks glu=False, thought_tokens=2"),
    (dict(logit_softcap=15.0, bias=True), "lacks bias=True, logit_softcap=15.0"),
    (dict(memory_slots=2, depths=(1, 2), future_peek=2), "depths=(1, 2), future_peek=2, memory_slots=2"),
    (dict(attention="diff"), "LlamaForCausalLM, lacks attention=diff"),
    (dict(attention="diff", diff_form="v1"), "lacks norm_eps=0.0\nDiffLlama has one epsilon"),
    (dict(attention="diff_mla"), "DeepseekV3ForCausalLM, lacks attention=diff_mla"),
    (dict(norm="layernorm"), "lacks norm=layernorm"),
    (dict(position="none"), "lacks position=none"),
    ({**GPT2, "glu": False, "position": "none"}, "GPT2LMHeadModel, lacks position=none"),
], ids=str)
def test_what_transformers_lacks_is_refused(change, words, tmp_path):
    model = GPT(GPTConfig(**{"vocab_size": 53, "n_layer": 2, **LLAMA, "mlp_hidden": 0, **change}))
    with pytest.raises(ValueError) as caught:
        M.export_hf(model, tmp_path / "there")
    assert words in str(caught.value) and not (tmp_path / "there").exists()


def nanogpt(folder, bias=True, vocab_size=53, compiled=True):
    """nanoGPT's ckpt.pt of a random model, in its names, and that model of ours."""
    model = ours(n_embd=64, n_head=4, block_size=64, vocab_size=vocab_size, norm="layernorm",
                 position="learned", activation="gelu", bias=bias)
    state = {"transformer.wte.weight": model.embed.weight, "lm_head.weight": model.head.weight,
             "transformer.wpe.weight": model.position.table.weight,
             "transformer.ln_f.weight": model.norm.weight}
    if bias:
        state["transformer.ln_f.bias"] = model.norm.bias
    for i, b in enumerate(model.blocks):
        parts = {"ln_1": b.norm1, "ln_2": b.norm2, "attn.c_attn": b.attention.qkv,
                 "attn.c_proj": b.attention.out, "mlp.c_fc": b.mlp.up, "mlp.c_proj": b.mlp.down}
        for name, part in parts.items():
            state |= {f"transformer.h.{i}.{name}.{k}": p for k, p in part.named_parameters()}
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril() # its mask, without flash
    args = dict(n_layer=3, n_head=4, n_embd=64, block_size=64, bias=bias, vocab_size=vocab_size, dropout=0.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-3)
    torch.save({"model": {"_orig_mod." * compiled + k: v.detach() for k, v in state.items()},
                "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 5,
                "best_val_loss": torch.tensor(3.0), "config": {"dataset": "play"}}, folder / "ckpt.pt")
    return model


@pytest.mark.parametrize("bias", (True, False))
def test_nanogpts_checkpoint(bias, tmp_path, capsys):
    model = nanogpt(tmp_path, bias, compiled=bias)
    back = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    parameters_equal(model, back)
    assert back.tokenizer is None and "has no tokenizer" in capsys.readouterr().out
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="was not written by train.py"):
        GPT.from_pretrained(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="no weights 'gpt3': .* gpt2, gpt2-medium"):
        GPT.from_pretrained("gpt3")


# --- the commands ---


def test_an_export_overwrites_exports_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    M.export_hf(ours(**LLAMA), tmp_path / "hf")
    M.save_checkpoint(tmp_path / "weights.pt", {"model": {}})
    M.save_checkpoint(tmp_path / "ckpt.pt", {"model": {}, "optimizer": {}})
    may = {form: [p.name for p in sorted(tmp_path.iterdir()) if M.may_replace(str(p), form)]
           for form in ("hf", "weights")}
    assert may == {"hf": ["empty", "hf"], "weights": ["weights.pt"]}
    assert all(M.may_replace(str(tmp_path / "new"), form) for form in may)


SHORT = ["--max_iters=0", "--batch_size=2", "--eval_iters=1", "--sample_tokens=4"]
TINY = ("--dataset=play --n_layer=2 --n_head=2 --n_embd=16 --mlp_hidden=32 --activation=silu --glu "
        "--block_size=32 --batch_size=4 --warmup_iters=2 --eval_interval=6 --log_interval=1 "
        "--sample_tokens=4").split()


def said(*argv, code=0):
    done = run([ROOT / argv[0], *argv[1:]])
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("settings:", " " * 10))]
    assert not code or len(lines) <= 3
    return done.stdout + "\n".join(lines)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of a model that is a Llama but for its drafting cell, in characters."""
    out = tmp_path_factory.mktemp("trained") / "run"
    said("train.py", *TINY, f"--data_dir={corpus / 'data'}", f"--out_dir={out}", "--max_iters=6",
         "--n_ahead=3")
    return out


@deep
def test_from_checkpoint_takes_a_folder_and_gives_the_tokenizer(trained, capsys):
    model = GPT.from_checkpoint(str(trained))
    assert model.tokenizer.decode(model.tokenizer.encode("to be")) == "to be" and not model.training
    parameters_equal(model, GPT.from_checkpoint(str(trained / "best.pt")))
    best = (trained / "best.pt").read_bytes()
    try:
        (trained / "best.pt").write_bytes(best[:-100])
        parameters_equal(GPT.from_checkpoint(str(trained)), GPT.from_checkpoint(str(trained / "ckpt.pt")))
        assert "WARNING" in capsys.readouterr().err
    finally:
        (trained / "best.pt").write_bytes(best)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        GPT.from_checkpoint(str(trained.parent))


@deep
def test_the_export_command(trained, tmp_path):
    words = said("model.py", "export", trained, "--format=hf", f"--to={tmp_path / 'hf'}")
    assert "left out" in words and "n_ahead" in words and "is a LlamaForCausalLM" in words
    model = GPT.from_checkpoint(str(trained))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    same_function(model, theirs)
    assert theirs.config.eos_token_id is None # a text of characters has no end
    said("model.py", "export", f"--to={tmp_path / 'hf'}", trained) # again, in any order: the folder is ours
    theirs.save_pretrained(tmp_path / "hf") # now it is not
    words = said("model.py", "export", trained, f"--to={tmp_path / 'hf'}", code=2)
    assert "is no earlier export: choose another --to" in words

    file = tmp_path / "weights.pt"
    said("model.py", "export", trained / "best.pt", "--format=weights", f"--to={file}")
    assert file.stat().st_size < (trained / "best.pt").stat().st_size / 2.5
    assert set(M.load_checkpoint(file)) == {"model", "config", "tokenizer", "step"}
    parameters_equal(model, GPT.from_checkpoint(str(file)))
    assert "to be" in said("sample.py", f"--out_dir={file}", "--start=to be", "--max_new_tokens=4")
    before = (trained / "ckpt.pt").read_bytes()
    said("model.py", "export", trained, "--format=weights", f"--to={trained / 'ckpt.pt'}", code=2)
    assert (trained / "ckpt.pt").read_bytes() == before
    words = said("train.py", f"--resume={file}", code=2)
    assert "holds weights alone" in words and f"--init_from={file}" in words
    assert "usage: python model.py export" in said("model.py", "export", "--format=hf", code=2)
    assert "--n_layer=6" in said("model.py", "--help") and "export" not in said("model.py", "--help")


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["val_loss"] for line in lines if "val_loss" in line]


@deep
def test_starting_from_our_own_run(trained, corpus, tmp_path):
    """Other text, a longer context, a new head; then what contradicts, and a character that it lacks."""
    (tmp_path / "other.txt").write_text("the question is that thou art\n" * 200, encoding="utf-8")
    begin = ["train.py", f"--init_from={trained}", f"--dataset={tmp_path / 'other.txt'}",
             f"--data_dir={tmp_path}", *SHORT]
    words = said(*begin, f"--out_dir={tmp_path / 'a'}", "--block_size=64", "--n_ahead=0", "--uncertainty")
    assert "STARTING from" in words and "block_size 32 becomes 64\n" in words
    assert "n_ahead is dropped" in words and "uncertainty starts at random" in words
    parameters_equal(GPT.from_checkpoint(str(trained)), GPT.from_checkpoint(str(tmp_path / "a")))
    here, there = data.load("other", tmp_path), data.load("play", corpus / "data")
    assert here.tokenizer.to_dict() == there.tokenizer.to_dict()
    other = f"--out_dir={tmp_path / 'b'}"
    assert f"{trained} has n_layer=2\ndrop --n_layer" in said(*begin, other, "--n_layer=3", code=2)
    assert "drop --tokenizer" in said(*begin, other, "--tokenizer=byte", code=2)
    assert "--init_from=, or drop it" in said(*begin, other, "--model_size=nano", code=2)
    (tmp_path / "config.py").write_text("n_layer = 3\ntokenizer = 'byte'\nmax_iters = 0", encoding="utf-8")
    words = said(*begin, other, tmp_path / "config.py")
    assert "decides: n_layer=2" in words and "tokenizer=byte is not that of" in words
    assert "NOTHING TO TRAIN" in said("train.py", tmp_path / "config.py", other, "--resume")
    data.prepare(tmp_path / "other.txt", "byte", tmp_path / "bytes")
    words = said(*begin, other, f"--data_dir={tmp_path / 'bytes'}", "--dataset=other", code=2)
    assert "python data.py prepare" in words and f"--data_dir={tmp_path / 'bytes'}2" in words
    (tmp_path / "new.txt").write_text("to be ~\n" * 99, encoding="utf-8")
    assert "lacks '~'" in said(*begin, other, f"--dataset={tmp_path / 'new.txt'}", code=2)
    assert "no weights 'gpt3'" in said(*begin, other, "--init_from=gpt3", code=2)


@deep
def test_starting_from_nanogpt(corpus, tmp_path):
    """Its learned positions are cut or get company. It names no tokenizer: the data's is taken."""
    vocab_size = data.load("play", corpus / "data").vocab_size
    model = nanogpt(tmp_path, vocab_size=vocab_size + 7) # padded
    begin = ["train.py", f"--init_from={tmp_path / 'ckpt.pt'}", "--dataset=play",
             f"--data_dir={corpus / 'data'}", *SHORT]
    for size, words in ((16, "are cut"), (100, "start at random")):
        assert words in said(*begin, f"--block_size={size}", f"--out_dir={tmp_path / str(size)}")
        got, rows = GPT.from_checkpoint(str(tmp_path / str(size))), min(size, 64)
        assert torch.equal(got.position.table.weight[:rows], model.position.table.weight[:rows])
        assert torch.equal(got.blocks[2].mlp.up.bias, model.blocks[2].mlp.up.bias)
    nanogpt(tmp_path, vocab_size=5)
    assert "vocab_size=5 is below" in said(*begin, f"--out_dir={tmp_path / 'c'}", code=2)


@deep
def test_finetuning_lowers_the_loss_and_resumes_exactly(tmp_path, mirror):
    """config/finetune_shakespeare.py from a small GPT-2 that transformers wrote: the run that is stopped and
    goes on without its source ends in the bits of the whole one.
    """
    made_by_transformers("gpt2", tmp_path / "gpt2", vocab_size=50257, n_embd=16, n_layer=2, n_head=2)
    text = (mirror / "tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000]
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    config = (ROOT / "config/finetune_shakespeare.py", f"--init_from={tmp_path / 'gpt2'}", "--block_size=32",
              f"--dataset={tmp_path / 'play.txt'}", f"--data_dir={tmp_path}", "--learning_rate=1e-2",
              "--eval_interval=5", "--eval_iters=4", "--sample_tokens=0", "--dropout=0.1")
    words = said("train.py", *config, f"--out_dir={tmp_path / 'whole'}", "--max_iters=10")
    assert "block_size 64 becomes 32: the learned positions beyond are cut" in words
    assert "by its vocab_size, assumed gpt2" in words
    first, *_, last = losses(tmp_path / "whole")
    assert last < first - 0.3
    said("train.py", *config, f"--out_dir={tmp_path / 'halves'}", "--max_iters=5")
    os.rename(tmp_path / "gpt2", tmp_path / "gone")
    said("train.py", "--resume", f"--out_dir={tmp_path / 'halves'}", "--max_iters=10")
    a, b = (M.load_checkpoint(tmp_path / out / "ckpt.pt") for out in ("whole", "halves"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"] | b["model"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


@deep
def test_importing_reads_no_command_line():
    code = "from model import GPT, GPTConfig; print(GPT(GPTConfig(n_layer=1, n_embd=12, n_head=2)).tokenizer)"
    done = run(["-c", code, "export", "--no_such_setting=1"])
    assert done.returncode == 0 and done.stdout == "None\n" and not done.stderr
