# "500M": 355,919,872 parameters, by the recipe that we would bet on: the same model, rows and
# steps as config/500m.py, and the same weights' format. Measured at three small sizes on a CPU
# (benchmarks/RESULTS.md, "Recipes"), not yet at this one.
data_dir = "data/openhermes"
out_dir = "out/500m_fast"

n_layer = 24
n_head = 16
n_embd = 1024
block_size = 2048
bias = True

micro_batch_size = 4
rows_per_step = 32  # on any number of GPUs: 65,536 tokens a step
epochs = 1.0
dropout = 0.0  # every token is seen once, so there is nothing to memorise

optimizer = "muon"  # at 64 to 128 channels AdamW's end came in about a third of its tokens
# A bet: in 250 steps 4.8e-2 was best at 64 channels and 2.4e-2 at 128, and longer runs want less; a
# published Muon run at 768 channels, tied embedding and 6,200 steps took 1.8e-3 on its matrices.
learning_rate = 2e-3
min_learning_rate = 2e-4  # a tenth: going down to zero did not pay
warmup_steps = 300  # a twentieth of the run, where 1,000 would be a sixth
beta2 = 0.99  # AdamW's, on the rest: lower by 0.03 nats than with 0.95
weight_decay = 0.1  # lower by 0.02 nats than with 0.01

dtype = "float16"
gradient_checkpointing = False  # True takes less memory for about a third more time

eval_interval = 1000
save_interval = 5000
keep_last = 3
