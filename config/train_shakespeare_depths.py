# train_shakespeare_adamw.py with 6 layers, of which a token takes 3 on average: its own state decides when it is done.
# python train.py config/train_shakespeare_depths.py
# bench_results/README.md has its loss beside 3 layers for all tokens and the time saved.

out_dir = "out/shakespeare_depths"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 6
depths = (2, 3, 4, 5, 6)
mean_depth = 3.0
n_head = 4
n_embd = 128
block_size = 128
attention = "diff_mla"
kv_rank = 48
rope_dim = 16
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
