# "500M": 355,919,872 parameters, by the recipe that we would bet on: the same model, rows and
# steps as config/500m.py, and the same weights' format. Measured at small sizes on a CPU
# (benchmarks/RESULTS.md, "Recipes"), not yet at this one.
data_dir = "data/openhermes"
out_dir = "out/500m_fast"

n_layer = 24
n_head = 16
n_embd = 1024
block_size = 2048
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step

optimizer = "muon"
# A bet, between 4e-3, to which the rate of 64 channels, 250 steps and 2,048 tokens a step leads by
# docs/speed.md's rule, and 1.1e-3, to which that of a published run of 124M parameters does.
learning_rate = 2e-3  # embeddings too: a rate of their own did not pay with Muon
min_learning_rate = 2e-4  # a tenth: going down to zero did not pay
warmup_steps = 300  # a twentieth of the run, where 1,000 would be a sixth
beta1 = 0.8  # AdamW's, on the rest: lower by 0.03 nats than with 0.9
beta2 = 0.99  # AdamW's, on the rest: lower by 0.03 nats than with 0.95
weight_decay = 0.1  # lower by 0.02 nats than with 0.01

dtype = "float16"
