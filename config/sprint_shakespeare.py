# The sprint: how soon is a loss of 1.8857 passed? nanoGPT's CPU recipe takes 2,000 steps to get there.
# python train.py config/sprint_shakespeare.py
# One layer is enough for that: small steps, many of them. bench_results/README.md has the seconds.

out_dir = "out/sprint_shakespeare"
dataset = "shakespeare"
sampling = "epochs"
offline_dataset = "pystdlib"

n_layer = 1
n_head = 2
n_embd = 128
block_size = 128
activation = "silu"
glu = True
conv = 4
qk_norm = True
zero_init = True
tie_embeddings = False

batch_size = 8
max_iters = 240
optimizer = "muon"
learning_rate = 2e-2
schedule = "linear"
warmup_iters = 10
min_lr = 0.0
dtype = "bfloat16"
eval_interval = 20
