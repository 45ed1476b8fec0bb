# A text whose answers lie further back than attention sees: after "a3", every "a" of the line is followed by
# "3". Attention sees windows of 32 characters, and lines have 1024: what is asked again in a later window,
# only memory can know. `python bench.py eval out/recall recall` counts how much of it the model knows.
# python train.py config/train_recall.py

out_dir = "out/recall"
dataset = "recall"

n_layer = 2
n_head = 4
n_embd = 64
block_size = 32
windows = 4
memory_slots = 8
document_token = 0

batch_size = 32
max_iters = 1000
optimizer = "muon"
learning_rate = 5e-3
schedule = "linear"
warmup_iters = 100
min_lr = 0.0
eval_interval = 500
sample_prompt = "a"
