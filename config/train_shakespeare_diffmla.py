# The main job: differential latent attention on TinyShakespeare's characters, 0.8M parameters, 2 CPU cores.
# python train.py config/train_shakespeare_diffmla.py

out_dir = "out/shakespeare_diffmla"
dataset = "shakespeare"
sampling = "epochs"
offline_dataset = "pystdlib"
n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
attention = "diff_mla"
kv_rank = 48
rope_dim = 16
activation = "silu"
glu = True
conv = 4
qk_norm = True
zero_init = True
n_ahead = 7
tie_embeddings = False

batch_size = 8
max_iters = 1200
optimizer = "muon"
learning_rate = 8e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
dtype = "bfloat16"
