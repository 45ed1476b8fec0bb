# Manifold-constrained hyper-connections: four residual streams around train_shakespeare_adamw.py, same budget.
# python train.py config/train_shakespeare_mhc.py
# bench_results/README.md has its losses beside --residual=hyper and plain.

out_dir = "out/shakespeare_mhc"
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
residual = "mhc"
qk_norm = True
zero_init = True
tie_embeddings = False

batch_size = 8
max_iters = 1400
learning_rate = 2e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1
