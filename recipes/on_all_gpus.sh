#!/usr/bin/env bash
# Runs generate.py, score.py or one of scorers/ once per GPU that is visible, each on its share of the rows:
#     bash recipes/on_all_gpus.sh out/on.jsonl python generate.py --model MODEL --prompts uf.jsonl
# writes out/on.0.jsonl, out/on.1.jsonl, ... Every stage reads several files as one (out/on.*.jsonl would also match the
# records: out/on.[0-9].jsonl does not). Fails if one of them fails; the same command goes on.
set -euo pipefail
out=$1
shift
mapfile -t gpus < <(tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}")
pids=()
for i in "${!gpus[@]}"; do
  CUDA_VISIBLE_DEVICES=${gpus[$i]} "$@" --shard "$i/${#gpus[@]}" --out "${out%.jsonl}.$i.jsonl" &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
