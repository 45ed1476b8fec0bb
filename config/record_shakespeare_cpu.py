# The record: below 1.4697 on two CPU cores, where nanoGPT's 10.65M parameters take three minutes on an A100.
# python train.py config/record_shakespeare_cpu.py
# bench_results/README.md says what each choice bought, and what bought nothing.

out_dir = "out/record_shakespeare_cpu"
dataset = "shakespeare"
sampling = "epochs"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 2
n_embd = 128
block_size = 256
activation = "silu"
glu = True
conv = 4
qk_norm = True
zero_init = True
tie_embeddings = False

batch_size = 8
max_iters = 1200
optimizer = "muon"
learning_rate = 8e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
dtype = "bfloat16"
