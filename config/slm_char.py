# A character model on the fixed ASCII table (99 ids): LayerNorm and biases, learned positions, GEGLU, untied head.
# python train.py config/slm_char.py --dataset=path/to/text
# Its source trains with a constant learning rate and decays every parameter; here gains and biases are not decayed.

out_dir = "out/slm_char"
dataset = "shakespeare"
tokenizer = "ascii"
data_dir = "data/ascii" # beside the char version of the same text
offline_dataset = "pystdlib"
val_fraction = 0.05

n_layer = 4
n_head = 4
n_embd = 256
mlp_hidden = 1024
block_size = 256
norm = "layernorm"
position = "learned"
activation = "gelu"
glu = True
bias = True
tie_embeddings = False
dropout = 0.1

batch_size = 16
max_iters = 10000
schedule = "constant"
warmup_iters = 0
learning_rate = 3e-4
min_lr = 3e-4
beta2 = 0.95
weight_decay = 0.1
eval_interval = 1000
sample_prompt = "The"
