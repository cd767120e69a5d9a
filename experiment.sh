#!/usr/bin/env bash
# The whole experiment: data to bins, a smoke test, every size and seed trained, measured and judged.
#
#   bash experiment.sh                                              # OpenHermes-2.5, 500m and 1b
#   SEEDS="42 43" CONTROL=HuggingFaceFW/fineweb-edu bash experiment.sh    # two seeds, one on web text
#   SOURCE=conversations.json SIZES=demo bash experiment.sh         # small, on a CPU
#
# Killed, it goes on where it stopped: run it again. What is done is not done twice. On several GPUs
# each stage that can uses them all. TRAIN, VERDICT: more flags of train.py, of the verdict.
set -euo pipefail
cd "$(dirname "$0")"

source=${SOURCE:-teknium/OpenHermes-2.5}
sizes=${SIZES:-500m 1b} seeds=${SEEDS:-42} control=${CONTROL:-}
read -ra train_flags <<<"${TRAIN:-}"
read -ra verdict_flags <<<"${VERDICT:---tasks=local,lambada_openai,hellaswag,arc_easy,piqa,winogrande}"
folder_name() { # SOURCE: a file's name without its ending, so that bins never lie in their source's place
  basename "$1" | sed -E 's/\.(json|jsonl|ndjson|parquet|arrow|txt)(\.[a-z0-9]+)?$//'
}
data=data/$(folder_name "$source") out=out/$(folder_name "$source")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')

launch() { # SCRIPT FLAGS: a process on each GPU; `--` keeps torchrun from taking --run for its own
  if ((gpus > 1)); then torchrun --standalone --nproc_per_node="$gpus" -- "$@"; else python "$@"; fi
}
prepare() { # SOURCE FOLDER FLAGS
  [ -e "$2/meta.json" ] || python prepare.py --source="$1" --data_dir="$2" "${@:3}"
}
text_bytes() { # FOLDER: of both splits
  python -c 'import json, sys; splits = json.load(open(sys.argv[1]))["splits"]
print(sum(split["text_bytes"] for split in splits.values()))' "$1/meta.json" 2>/dev/null ||
    { echo "$1/meta.json does not tell the bytes of text: remove it, and run this again" >&2; exit 1; }
}
last_step() { # RUN: the name of its last checkpoint, once it has begun; train.py mends a torn config.json
  python -c 'import json, sys; print("step_%06d" % json.load(open(sys.argv[1]))["max_steps"])' "$1/config.json" 2>/dev/null
}
is_trained() { # RUN
  [ -e "$1/latest" ] && [ "$(<"$1/latest")" = "$(last_step "$1")" ]
}
train() { # RUN SIZE DATA FLAGS
  is_trained "$1" || launch train.py "config/$2.py" --out_dir="$1" --data_dir="$3" "${train_flags[@]}" "${@:4}"
  is_trained "$1" || { echo "$1 was stopped: run this again"; exit 1; }
  [ -e "$1/eval_ppl.json" ] || launch eval_ppl.py --run="$1"
  [ -e "$1/generations.jsonl" ] || python sample.py --run="$1" --prompts=data/tasks/prompts.jsonl
}

for size in $sizes; do # before hours are spent, and before the data is there by assumption
  echo "== the plan of $size: one of ${seeds// /, } each, against 1 device-hour a run"
  python -m benchmarks.plan "config/$size.py" --data_dir="$data" --n_devices=$((gpus > 1 ? gpus : 1)) \
    "${train_flags[@]}"
done
prepare "$source" "$data"
if [ -n "$control" ]; then # as much text, and no more of what may be the whole web
  max_bytes=$(text_bytes "$data")
  prepare "$control" "data/$(folder_name "$control")" --max_bytes="$max_bytes"
fi

for size in $sizes; do
  smoke=$out/smoke-$size # the first 100 steps of it, so that a broken path costs minutes
  train "$smoke" "$size" "$data" --max_steps=100 --warmup_steps=10
  run_flags=()
  for seed in $seeds; do
    train "$out/$size-$seed" "$size" "$data" --seed="$seed"
    run_flags+=(--run="$out/$size-$seed")
  done
  if [ -n "$control" ]; then # of as many tokens, by as many steps
    steps=$(last_step "$out/$size-${seeds%% *}")
    train "$out/$size-control" "$size" "data/$(folder_name "$control")" --max_steps=$((10#${steps#step_}))
    run_flags+=(--control="$out/$size-control")
  fi
  python -m verdict "${run_flags[@]}" --output_dir="$out/$size" "${verdict_flags[@]}"
done
runs=()
for size in $sizes; do for seed in $seeds; do runs+=(--run="$out/$size-$seed"); done; done
python -m verdict "${runs[@]}" --only=report --output_dir="$out"
echo "the verdict: $out/report.html"
