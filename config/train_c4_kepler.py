# The Kepler Architecture's Skeleton & Flesh on C4: 353.5M parameters, a fifth of the weights at the end.
# python train.py config/train_c4_kepler.py
# It wants a GPU with 80 GB. config/skeleton_flesh.py is the same question for a laptop.

out_dir = "out/c4_kepler"
dataset = "c4" # its first 100 million tokens; python data.py prepare has more
tokenizer = "gpt2"
data_dir = "data/gpt2" # beside other versions of the same text
offline_dataset = "pystdlib"

n_layer = 24
n_head = 16
n_embd = 1024
mlp_hidden = 2730
block_size = 1024
activation = "silu"
glu = True
init_std = 0.02

batch_size = 32
max_iters = 10000
schedule = "wsd"
warmup_iters = 1000
learning_rate = 3e-4
min_lr = 0.0
beta2 = 0.95
sparse = "skeleton_flesh"
sparse_interval = 500 # its source chooses at every 1,000 steps, and so never gets below half of the weights
sparse_boost = 10.0
sparse_boost_steps = 200
