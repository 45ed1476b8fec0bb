# A Llama-style model of 22,551,040 parameters: RMSNorm, RoPE, SwiGLU, untied head, vocabulary of 2048.
# python train.py config/train_tinystories_sota.py
# The learning rate is constant, as in its source. It wants a GPU. Its source takes the 2,048 most frequent
# words for tokens; bytes use an eighth of that vocabulary, any FILE.json of so many tokens uses all.

out_dir = "out/tinystories_sota"
dataset = "tinystories" # a download of 2.2 GB
tokenizer = "byte"
data_dir = "data/byte" # beside other versions of the same text
offline_dataset = "pystdlib"
vocab_size = 2048

n_layer = 6
n_head = 8
n_embd = 512
mlp_hidden = 1536 # 8/3 of 512, rounded up to a multiple of 256
block_size = 128
activation = "silu"
glu = True
tie_embeddings = False
dropout = 0.1

batch_size = 32
max_iters = 5000
schedule = "constant"
warmup_iters = 0
learning_rate = 3e-4
min_lr = 3e-4
beta2 = 0.999
weight_decay = 0.1
