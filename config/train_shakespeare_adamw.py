# What the main job was before Muon, SwiGLU, two heads and the short convolution: AdamW, ReLU^2, four heads.
# python train.py config/train_shakespeare_adamw.py
# Most ideas in bench_results/README.md were measured on it. Its plain twin: --attention=mha

out_dir = "out/shakespeare_adamw"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
attention = "diff_mla"
kv_rank = 48
rope_dim = 16
qk_norm = True
zero_init = True
n_ahead = 7
tie_embeddings = False

batch_size = 8
max_iters = 1400
learning_rate = 2e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1
