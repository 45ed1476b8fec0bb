# Plain attention, the twin of train_shakespeare_diffmla.py: same widths, budget, recipe and data order.
# python train.py config/train_shakespeare_mha.py

out_dir = "out/shakespeare_mha"
dataset = "shakespeare"
sampling = "epochs"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
attention = "mha"
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
