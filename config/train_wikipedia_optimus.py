# Latent attention on GPT-2 tokens: 8 layers of 768, 12 heads of 64, latents of 384, SwiGLU of 3072. Half of
# each head is rotated, and all heads share one rotary key: 416 cached numbers a token. Its source, with a
# rotary key per head, caches 1,152, and plain attention 1,536. 149M parameters want a GPU.
# python train.py config/train_wikipedia_optimus.py
# Its source pads the first 64 tokens of each article; here whole articles follow one another.
out_dir = "out/wikipedia_optimus"
dataset = "wikipedia" # its first 100 million tokens; python data.py prepare has more
tokenizer = "gpt2"
data_dir = "data/gpt2" # beside other versions of the same text
offline_dataset = "pystdlib"
n_layer = 8
n_head = 12
n_embd = 768
attention = "mla"
q_rank = 384
kv_rank = 384
rope_dim = 32
mlp_hidden = 3072
activation = "silu"
glu = True
tie_embeddings = False
dropout = 0.15
block_size = 64
batch_size = 64
max_iters = 8400
warmup_iters = 840
learning_rate = 1e-3
min_lr = 0.0
beta2 = 0.999
weight_decay = 0.01
