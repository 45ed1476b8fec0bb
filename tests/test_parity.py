"""
The same weights in transformers' models give the same logits: GPT-2, Llama, DiffLlama, DeepSeek-V3.

Its rotary embedding turns halves (i, i + D/2) where ours turns neighbours (2i, 2i + 1), so rows of queries
and keys are reordered on the way.
"""
import pytest
import torch

from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed; only tests use it")


def halves_first(weight, heads):
    """Rows of `heads` heads from neighbouring pairs to pairs of halves: 0, 2, 4, ... then 1, 3, 5, ..."""
    w = weight.unflatten(0, (heads, -1))
    return torch.cat([w[:, 0::2], w[:, 1::2]], dim=1).flatten(0, 1)


def compare(ours, theirs, tolerance=1e-4):
    idx = torch.randint(ours.config.vocab_size, (3, 32))
    with torch.no_grad():
        want, got = theirs.eval()(idx).logits, ours.eval()(idx, idx)[0]
    assert want.std() > 0.3 # not a comparison of zeros
    assert (got - want).abs().max() < tolerance


def ours(**config):
    model = GPT(GPTConfig(vocab_size=53, block_size=64, n_layer=4, **config))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) # gains away from 1, lambdas away from their start
    return model


def llama_state(model):
    """Names of Llama-like models for embeddings, norms, MLP and head."""
    parts = {"model.embed_tokens": model.embed, "model.norm": model.norm, "lm_head": model.head}
    state = {name: part.weight for name, part in parts.items()}
    for i, block in enumerate(model.blocks):
        p = f"model.layers.{i}."
        gate, up = block.mlp.gate_up.weight.chunk(2)
        state |= {p + "input_layernorm": block.norm1.weight,
                  p + "post_attention_layernorm": block.norm2.weight,
                  p + "self_attn.o_proj": block.attention.out.weight, p + "mlp.gate_proj": gate,
                  p + "mlp.up_proj": up, p + "mlp.down_proj": block.mlp.down.weight}
    return {name + ".weight": weight for name, weight in state.items()}


def dense_qkv(model, state):
    for i, block in enumerate(model.blocks):
        a, p = block.attention, f"model.layers.{i}.self_attn."
        q, k, v = a.qkv.weight.split([a.Q * a.D, a.K * a.D, a.K * a.D])
        state |= {p + "q_proj.weight": halves_first(q, a.Q), p + "k_proj.weight": halves_first(k, a.K)}
        state[p + "v_proj.weight"] = v
    return state


SHAPE = dict(vocab_size=53, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=64, tie_word_embeddings=False)
GLU = dict(n_embd=64, mlp_hidden=96, activation="silu", glu=True, tie_embeddings=False)


def test_gpt2():
    model = ours(n_embd=64, n_head=4, norm="layernorm", position="learned", activation="gelu", bias=True)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=53, n_positions=64, n_embd=64, n_layer=4, n_head=4, activation_function="gelu"))
    state = {"transformer.wte.weight": model.embed.weight,
             "transformer.wpe.weight": model.position.table.weight,
             "transformer.ln_f.weight": model.norm.weight, "transformer.ln_f.bias": model.norm.bias,
             "lm_head.weight": model.head.weight}
    for i, b in enumerate(model.blocks):
        parts = {"ln_1": b.norm1, "ln_2": b.norm2, "attn.c_attn": b.attention.qkv,
                 "attn.c_proj": b.attention.out, "mlp.c_fc": b.mlp.up, "mlp.c_proj": b.mlp.down}
        for name, m in parts.items():
            weight = m.weight.T if m.weight.dim() > 1 else m.weight # its Conv1D is transposed
            state[f"transformer.h.{i}.{name}.weight"] = weight
            state[f"transformer.h.{i}.{name}.bias"] = m.bias
    theirs.load_state_dict(state)
    compare(model, theirs)


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_llama(kv_heads):
    model = ours(**GLU, n_head=4, n_kv_head=kv_heads)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SHAPE, num_key_value_heads=kv_heads, rms_norm_eps=1e-6))
    theirs.load_state_dict(dense_qkv(model, llama_state(model)))
    compare(model, theirs)


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
@pytest.mark.parametrize("kv_heads", (4, 2))
def test_diff_llama(kv_heads, implementation):
    model = ours(**GLU, n_head=4, n_kv_head=kv_heads, attention="diff", diff_form="v1", norm_eps=1e-5)
    theirs = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(
        **SHAPE, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, attn_implementation=implementation))
    state = dense_qkv(model, llama_state(model))
    for i, block in enumerate(model.blocks):
        for name, vector in zip(("q1", "k1", "q2", "k2"), block.attention.maps.vectors):
            state[f"model.layers.{i}.self_attn.lambda_{name}"] = vector
    theirs.load_state_dict(state)
    compare(model, theirs)


@pytest.mark.parametrize("q_rank", (0, 24))
def test_deepseek_v3(q_rank):
    """32-wide heads, 8 of them rotated. Its rotary pairs are neighbours, as ours: no reordering."""
    model = ours(**GLU, n_head=4, head_dim=32, attention="mla", kv_rank=20, rope_dim=8, q_rank=q_rank)
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        **SHAPE, num_key_value_heads=4, q_lora_rank=q_rank or None, kv_lora_rank=20, qk_nope_head_dim=24,
        qk_rope_head_dim=8, v_head_dim=32, first_k_dense_replace=4, rope_interleave=True, rms_norm_eps=1e-6))
    state = llama_state(model)
    for i, block in enumerate(model.blocks):
        a, p = block.attention, f"model.layers.{i}.self_attn."
        parts = {"kv_a_proj_with_mqa": a.kv_down, "kv_a_layernorm": a.kv_norm, "kv_b_proj": a.kv_up}
        if q_rank:
            parts |= {"q_a_proj": a.q_down, "q_a_layernorm": a.q_latent_norm, "q_b_proj": a.q_up}
        else:
            parts["q_proj"] = a.q_up
        state |= {f"{p}{name}.weight": part.weight for name, part in parts.items()}
    theirs.load_state_dict(state)
    compare(model, theirs)
