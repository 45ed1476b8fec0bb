# Recall over a long context: each line tells 42 keys with a digit each, then asks all in another order.
# `python bench.py eval out/needles needles` counts right answers and the attention to them. Longer lines:
# --dataset=needles_512 --block_size=512 (85 keys), --dataset=needles_1024 --block_size=1024 (170 keys).
# python train.py config/train_needles.py

out_dir = "out/needles"
dataset = "needles"

n_layer = 2
n_head = 2
n_embd = 64
block_size = 256
attention = "diff_mla"
kv_rank = 24
rope_dim = 8
conv = 4
tie_embeddings = False
qk_norm = True
zero_init = True

batch_size = 8
max_iters = 1200
optimizer = "muon"
learning_rate = 8e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
