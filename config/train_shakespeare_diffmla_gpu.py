# Differential latent attention at nanoGPT's GPU budget for TinyShakespeare: at most 10.65M parameters,
# context 256, batch 64, 5,000 steps. For one GPU; it has not run on one yet, so no figure is claimed.
# python train.py config/train_shakespeare_diffmla_gpu.py

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
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
