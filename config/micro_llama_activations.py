# The Kepler Architecture's micro-LLaMA: is CRReLU-GLU better than SwiGLU at the same start, data and steps?
# python train.py config/micro_llama_activations.py
# The other side is --activation=silu. Its source takes wikitext and 6 layers of 384, which want a GPU.

out_dir = "out/micro_llama"
dataset = "shakespeare"
tokenizer = "char"
offline_dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
activation = "crrelu"
glu = True
qk_norm = True
tie_embeddings = False

batch_size = 8
max_iters = 600
learning_rate = 2e-3
schedule = "linear"
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.1
