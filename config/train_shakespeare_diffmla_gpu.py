# Differential latent attention for one GPU: nanoGPT's 10.65M parameters and context of 256 at most, and 1,500
# steps of its batch of 64 where nanoGPT takes 5,000. Muon in place of AdamW; not tuned.
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
max_iters = 1500
optimizer = "muon"
learning_rate = 3e-3
schedule = "linear"
min_lr = 0.0
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.1
