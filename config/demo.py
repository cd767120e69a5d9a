# A small model for the conversations of data/make_sample.py: some six minutes on 2 CPU cores.
data_dir = "data/demo"
out_dir = "out/demo"

# Most of the 6.8M parameters are the embedding's; two layers are what copying and looking up need.
n_layer = 2
n_head = 4
n_embd = 128
block_size = 80  # the longest conversation has 73 tokens

micro_batch_size = 18
rows_per_step = 18  # small batches: many steps count for more than smooth ones
max_steps = 3800  # about 2.6 epochs

optimizer = "muon"  # 89% of the held-out answers right, where AdamW got 57% in as many steps
learning_rate = 5e-3
min_learning_rate = 0.0
decay = "linear"
warmup_steps = 100
beta2 = 0.98  # the batches are small, so the second moment averages over more of them

loss_on = "assistant"  # the prompts are random draws: there is nothing to learn in them

eval_interval = 500
save_interval = 1000
log_interval = 100
