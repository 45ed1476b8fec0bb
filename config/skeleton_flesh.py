# Skeleton & Flesh: training leaves a fifth of the weights, chosen by signal to noise and by gradient.
# python train.py config/skeleton_flesh.py
# It takes any --dataset=path/to/text. bench_results/README.md compares it with --sparse=magnitude.

out_dir = "out/skeleton_flesh"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
qk_norm = True
zero_init = True
tie_embeddings = False

batch_size = 8
max_iters = 1400
learning_rate = 2e-3
schedule = "wsd"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1

sparse = "skeleton_flesh"
sparse_density = 0.2
sparse_interval = 100
