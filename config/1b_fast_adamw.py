# "1B": 760,372,224 parameters, by AdamW with a rate for embeddings: the same model, rows and
# steps as config/1b.py, and the same weights' format. Measured at small sizes on a CPU
# (benchmarks/RESULTS.md, "Recipes"), not yet at this one.
data_dir = "data/openhermes"
out_dir = "out/1b_fast_adamw"

n_layer = 24
n_head = 24
n_embd = 1536
block_size = 2048
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step

optimizer = "adamw"  # see config/500m_fast_adamw.py
learning_rate = 3.3e-4  # as there, by one over the width
min_learning_rate = 3.3e-5
embedding_learning_rate = 3.3e-3
warmup_steps = 1000
beta1 = 0.8
beta2 = 0.99
weight_decay = 0.1

dtype = "float16"
