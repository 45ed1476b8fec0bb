# LEPTON's size "tiny" with its six ideas and its flags: RMSNorm, RoPE, SwiGLU, tied head; 109M parameters and
# 12M for the ideas. It wants a GPU. bench_results/README.md has what each idea does to a small model.
# python train.py config/lepton_tiny.py
# With shards: --dataset=path/to/shards --tokenizer=pile_tokenizer.json --data_dir=data
# Its source counts 50,000 forwards of 4 sequences: 3,125 steps. `python model.py` lists the other sizes.
out_dir = "out/lepton_tiny"
model_size = "tiny" # 10 layers of 768, context 512
thought_tokens = 3
memory_slots = 6
memory_segment = 64 # its chunks
depths = (2, 4, 10)
future_peek = 8
n_ahead = 4
uncertainty = True
dataset = "shakespeare"
tokenizer = "gpt2"
data_dir = "data/gpt2" # beside the char version of the same text
offline_dataset = "pystdlib"
batch_size = 4
gradient_accumulation_steps = 16
max_iters = 3125
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100 # its source accepts a warm-up and never uses it
beta2 = 0.95
weight_decay = 0.1
eval_iters = 30
sample_prompt = "Artificial intelligence will"
sample_tokens = 50
