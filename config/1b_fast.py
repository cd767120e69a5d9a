# "1B": 760,372,224 parameters, by the recipe that we would bet on: the same model, rows and
# steps as config/1b.py, and the same weights' format. Measured at small sizes on a CPU
# (benchmarks/RESULTS.md, "Recipes"), not yet at this one.
data_dir = "data/openhermes"
out_dir = "out/1b_fast"

n_layer = 24
n_head = 24
n_embd = 1536
block_size = 2048
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step

optimizer = "muon"  # see config/500m_fast.py
learning_rate = 1.6e-3  # as there, by one over the root of the width
embedding_learning_rate = 6.4e-3
min_learning_rate = 1.6e-4  # a tenth: going down to zero did not pay
warmup_steps = 300  # a twentieth of the run, where 1,000 would be a sixth
beta1 = 0.8
beta2 = 0.99
weight_decay = 0.1

dtype = "float16"
