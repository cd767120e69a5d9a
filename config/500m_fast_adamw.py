# "500M": 355,919,872 parameters, by AdamW with a rate for embeddings: the same model, rows and
# steps as config/500m.py, and the same weights' format. Measured at small sizes on a CPU
# (benchmarks/RESULTS.md, "Recipes"), not yet at this one.
data_dir = "data/openhermes"
out_dir = "out/500m_fast_adamw"

n_layer = 24
n_head = 16
n_embd = 1024
block_size = 2048
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step

optimizer = "adamw"
# A bet. docs/speed.md's rule leads from 1,000 steps of 2,048 tokens to 3.9e-4, 2.9e-4 and 3.9e-4
# (64, 96 and 128 channels), and from a published run of 124M parameters to 1.1e-3.
learning_rate = 5e-4
min_learning_rate = 5e-5
embedding_learning_rate = 5e-3  # ten times the matrices', as at 96 and 128 channels; five at 64
warmup_steps = 1000  # a sixth of the run: of 250 steps 10% and 30% were the same
beta1 = 0.8  # lower by 0.06 nats than with 0.9
beta2 = 0.99
weight_decay = 0.1  # lower by 0.04 nats than with 0.3

dtype = "float16"
