# The recipe of record_shakespeare_cpu.py at 10.5M parameters, for one GPU: below nanoGPT's 10.65M and 1.4697?
# python train.py config/record_shakespeare_gpu.py
# It has not run on a GPU yet. Ten passes over the text, because at 24 passes AdamW's and Muon's runs overfit.

out_dir = "out/record_shakespeare_gpu"
dataset = "shakespeare"
sampling = "epochs"
offline_dataset = "pystdlib"

n_layer = 6
n_head = 3
n_embd = 384
block_size = 256
activation = "silu"
glu = True
mlp_hidden = 992
conv = 4
qk_norm = True
zero_init = True
tie_embeddings = False
dropout = 0.3

batch_size = 64
max_iters = 600
optimizer = "muon"
learning_rate = 5e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
eval_interval = 100
