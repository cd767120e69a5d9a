# A small model for the conversations of data/make_sample.py: a minute on 2 CPU cores.
data_dir = "data/demo"
out_dir = "out/demo"

# Nearly all of the 3.3M parameters are the embedding's, and two fifths of the time go into its
# product with the tokens of the answers. At 64 channels a token costs half of what it does at 128.
n_layer = 2
n_head = 2
n_embd = 64
block_size = 92  # two conversations, each of 46 tokens: none is cut in two by a row's end

micro_batch_size = 30
rows_per_step = 30
max_steps = 600  # about 1.6 epochs

optimizer = "muon"
learning_rate = 1.5e-2
embedding_learning_rate = 3e-2  # a token is met in few steps only, and must learn from these
min_learning_rate = 0.0
decay = "linear"
warmup_steps = 25
weight_decay = 0.1  # ahead of 0.01 by two seeds, if by no more than seeds differ
beta2 = 0.98  # the batches are small, so the second moment averages over more of them

loss_on = "assistant"  # the prompts are random draws: there is nothing to learn in them

eval_interval = 200
save_interval = 1000
log_interval = 50
