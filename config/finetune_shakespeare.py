# GPT-2 of 124M parameters goes on with TinyShakespeare, in its own byte pairs: 200 steps of 8,192 tokens.
# python train.py config/finetune_shakespeare.py
# Another start: --init_from=gpt2-medium, a folder that transformers wrote, or a .pt file. A few passes over
# 300,000 tokens are enough: with more, the validation loss rises again, and best.pt keeps the lowest.

out_dir = "out/finetune_shakespeare"
init_from = "gpt2"
dataset = "shakespeare"
data_dir = "data/gpt2" # beside other versions of the same text

block_size = 512 # of GPT-2's 1,024: half the memory
dropout = 0.1

batch_size = 2
gradient_accumulation_steps = 8
max_iters = 200
learning_rate = 3e-5
schedule = "constant"
warmup_iters = 0
beta2 = 0.99
weight_decay = 0.1
eval_interval = 20
eval_iters = 20
