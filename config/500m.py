# "500M": 355,919,872 parameters. One epoch of OpenHermes-2.5 in steps of 65,536
# tokens, on any number of GPUs that divides 8.
data_dir = "data/openhermes"
out_dir = "out/500m"

n_layer = 24
n_head = 16
n_embd = 1024
block_size = 2048
bias = True

micro_batch_size = 4
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step
epochs = 1.0
dropout = 0.0  # every token is seen once, so there is nothing to memorise

learning_rate = 2e-4
min_learning_rate = 2e-5
warmup_steps = 1000
weight_decay = 0.01

dtype = "float16"
gradient_checkpointing = False  # True takes less memory for about a third more time

eval_interval = 1000
save_interval = 5000
keep_last = 3
