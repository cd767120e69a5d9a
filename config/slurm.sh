#!/bin/bash
# An example for Slurm: two nodes of 8 GPUs, the steps of one. Submit with: sbatch config/slurm.sh config/1b.py
#SBATCH --job-name=nanosynth
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=02:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue

# 300 s before the limit Slurm sends SIGUSR1: torchrun hands it on, all ranks save and exit 0. The
# requeued job runs the same command and goes on from there. torch 2.11's torchrun has no
# --shutdown-timeout: leave it out there.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 \
  --rdzv_backend=c10d --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=180 \
  train.py "$@" --micro_batch_size=2
