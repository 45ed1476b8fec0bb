# nanoGPT's CPU recipe for TinyShakespeare, field for field: the baseline for all the others.
# python train.py config/train_shakespeare_nanogpt.py
# nanoGPT's README quotes 1.88 after about 3 minutes on a laptop, from 20 random validation batches.

out_dir = "out/shakespeare_nanogpt"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
norm = "layernorm"
position = "learned"
activation = "gelu"
init_std = 0.02

batch_size = 12
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
compile = False
