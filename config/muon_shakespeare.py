# Muon for the matrices and AdamW for the rest, on a plain model at nanoGPT's CPU shape. How few steps of 768
# characters pass the loss for which nanoGPT's recipe takes 2,000? bench_results/README.md has the answer.
# python train.py config/muon_shakespeare.py

out_dir = "out/muon_shakespeare"
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
max_iters = 350
optimizer = "muon"
learning_rate = 7e-3
schedule = "linear"
warmup_iters = 10
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1
eval_interval = 10 # to see the step at which a loss is passed
