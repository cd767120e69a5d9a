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
# A bet. docs/speed.md's rule leads from 1,000 steps of 2,048 tokens to 1.6e-3, 1.9e-3 and 2.2e-3
# (64, 96 and 128 channels), and from a published run of 124M parameters to 1.1e-3.
learning_rate = 2e-3
embedding_learning_rate = 8e-3  # four times that, as over 1,000 steps; over 250 one or two times
min_learning_rate = 2e-4  # a tenth: going down to zero did not pay
warmup_steps = 300  # a twentieth of the run, where 1,000 would be a sixth
beta1 = 0.8  # AdamW's, on the rest: lower by 0.03 nats than with 0.9
beta2 = 0.99  # AdamW's, on the rest: lower by 0.02 nats than with 0.95
weight_decay = 0.1  # 0.01 and 0.3 cost 0.01 nats each: not told from none

dtype = "float16"
