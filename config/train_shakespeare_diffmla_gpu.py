# Differential latent attention on one GPU, at most nanoGPT's 10.65M parameters and its batch of 64 x 256.
# python train.py config/train_shakespeare_diffmla_gpu.py
# Not tuned: on an H100 the lowest loss is 1.5001 (1.4967 to 1.5042), at step 500 to 750. nanoGPT's is 1.4697.

out_dir = "out/shakespeare_diffmla_gpu"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
attention = "diff_mla"
kv_rank = 96
rope_dim = 32
qk_norm = True
zero_init = True
tie_embeddings = False
dropout = 0.2

batch_size = 64
max_iters = 1500
optimizer = "muon"
learning_rate = 3e-3
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.1
