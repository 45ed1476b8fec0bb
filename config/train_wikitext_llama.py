# The Kepler Architecture's micro-LLaMA on WikiText-2, as in its source: 30M parameters, CRReLU-GLU of 1024.
# python train.py config/train_wikitext_llama.py
# The other side is --activation=silu. It wants a GPU; config/micro_llama_activations.py is the same question
# for a laptop.

out_dir = "out/wikitext_llama"
dataset = "wikitext"
tokenizer = "gpt2"
data_dir = "data/gpt2" # beside other versions of the same text
offline_dataset = "pystdlib"

n_layer = 6
n_head = 8
n_embd = 384
mlp_hidden = 1024
block_size = 256
position = "learned"
activation = "crrelu"
glu = True
init_std = 0.02

batch_size = 64
max_iters = 600
schedule = "constant"
warmup_iters = 0
learning_rate = 3e-4
min_lr = 3e-4
beta2 = 0.999
weight_decay = 0.01
