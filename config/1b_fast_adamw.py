# "1B": 760,372,224 parameters, by AdamW with a rate for embeddings: the same model, rows and
# steps as config/1b.py, and the same weights' format. Measured at small sizes on a CPU
# (benchmarks/RESULTS.md, "Recipes"), not yet at this one.
data_dir = "data/openhermes"
out_dir = "out/1b_fast_adamw"

n_layer = 24
n_head = 24
n_embd = 1536
block_size = 2048
bias = True

micro_batch_size = 4
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step
epochs = 1.0
dropout = 0.0  # every token is seen once, so there is nothing to memorise

optimizer = "adamw"  # see config/500m_fast_adamw.py
learning_rate = 3.3e-4  # as there, by one over the width
min_learning_rate = 3.3e-5
embedding_learning_rate = 3.3e-3
warmup_steps = 1000
beta1 = 0.8
beta2 = 0.99
weight_decay = 0.1

dtype = "float16"
gradient_checkpointing = False  # True takes less memory for about a third more time

eval_interval = 1000
save_interval = 5000
keep_last = 3
