# FAdam on the plain model of muon_shakespeare.py, 1,000 steps of 768 characters, with a tuned rate.
# python train.py config/fadam_shakespeare.py
# Its weight decay is preconditioned: 0.001 here is about what 0.1 is to AdamW. It clips by itself alone.
# bench_results/README.md compares the optimizers.

out_dir = "out/fadam_shakespeare"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"
n_layer = 4
n_head = 2
n_embd = 128
block_size = 64
activation = "silu"
glu = True
qk_norm = True
zero_init = True
tie_embeddings = False
batch_size = 12
max_iters = 1000
optimizer = "fadam"
learning_rate = 1e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.001
grad_clip = 0.0
eval_interval = 50
