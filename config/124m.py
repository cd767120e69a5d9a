# GPT-2's small shape, 124,475,904 parameters, for one GPU of 16 GB: an evening on OpenHermes-2.5.
# Computed, not measured: `python -m benchmarks.plan config/124m.py --gpu=T4 --n_devices=1`.
data_dir = "data/openhermes"
out_dir = "out/124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = True

micro_batch_size = 8
rows_per_step = 64  # 65,536 tokens a step, and so as many steps as config/500m.py and 1b.py
epochs = 1.0
dropout = 0.0  # every token is seen once, so there is nothing to memorise

learning_rate = 6e-4  # smaller models bear larger ones; GPT-3's of this size (table 2.1)
min_learning_rate = 6e-5
warmup_steps = 300  # a twentieth of the run
weight_decay = 0.01

dtype = "float16"  # a T4 has no bfloat16
gradient_checkpointing = False  # True takes less memory for about a third more time

eval_interval = 1000
save_interval = 1000  # an evening's GPU may be taken away
keep_last = 3
budget_hours = 8.0  # of one T4, whose peak is a fifteenth of an H100's
