# GPT-2's smallest shape, 124M parameters as in nanoGPT, with rotary positions, RMSNorm, q/k norm and ReLU^2.
# python data.py prepare fineweb --max_tokens=2_500_000_000 --data_dir=data/gpt2
# python train.py config/gpt2_124m_fineweb.py
# For one GPU with 40 GB: bf16, compiled, half a million tokens a step. Offline it trains on the standard
# library of Python: enough to see the speed, far too little text for this model.

out_dir = "out/gpt2_124m_fineweb"
dataset = "fineweb"
tokenizer = "gpt2"
data_dir = "data/gpt2" # beside other versions of the same text
offline_dataset = "pystdlib"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
qk_norm = True

batch_size = 16
gradient_accumulation_steps = 30 # 16 x 1,024 x 30 = 491,520 tokens
max_iters = 19000 # 9.3G tokens, nearly four epochs of the 2.5G above
eval_interval = 500
learning_rate = 1e-3
min_lr = 0.0
schedule = "wsd"
warmup_iters = 500
beta2 = 0.95
weight_decay = 0.1
