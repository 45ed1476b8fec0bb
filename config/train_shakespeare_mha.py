# Plain attention, the twin of train_shakespeare_diffmla.py: same widths, budget, schedule and data order.
# python train.py config/train_shakespeare_mha.py

out_dir = "out/shakespeare_mha"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
attention = "mha"
qk_norm = True
zero_init = True
n_ahead = 7
tie_embeddings = False

batch_size = 8
max_iters = 1400
learning_rate = 2e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1
