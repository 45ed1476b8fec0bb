# Adam-mini on a Llama-shaped model of 3.0M parameters: RMSNorm, RoPE, grouped queries, SwiGLU, untied head.
# python train.py config/adam_mini_llama.py
# Compare it with --optimizer=adamw. `python optim.py config/adam_mini_llama.py --vocab_size=65` prints its
# blocks.

out_dir = "out/adam_mini_llama"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 8
n_kv_head = 4
n_embd = 256
block_size = 128
activation = "silu"
glu = True
tie_embeddings = False

batch_size = 8
max_iters = 1000
optimizer = "adam_mini"
learning_rate = 1e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1
