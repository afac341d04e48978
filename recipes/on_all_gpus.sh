#!/usr/bin/env bash
# Runs generate.py, score.py or a script of scorers/ once per visible GPU, each on its share of the rows; once without one.
#
#     bash recipes/on_all_gpus.sh out/on python generate.py --model MODEL --prompts uf.jsonl
#
# writes out/on/0.jsonl, out/on/1.jsonl, ...; every stage reads several files as one (--responses out/on/*.jsonl).
# Fails if one of them fails; the same command resumes.
set -euo pipefail
folder=$1
shift
gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
IFS=, read -ra gpus <<<"$gpus"
mkdir -p "$folder"
count=$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))
if [ -e "$folder/$count.jsonl" ]; then
  echo "on_all_gpus.sh: $folder was made on more than $count GPUs; use as many again, or another folder" >&2
  exit 2
fi
if [ "$count" = 1 ]; then exec "$@" --out "$folder/0.jsonl"; fi

pids=()
trap 'kill "${pids[@]}"; wait' INT TERM # Ctrl-C does not reach what runs in the background
for i in "${!gpus[@]}"; do
  CUDA_VISIBLE_DEVICES=${gpus[$i]} "$@" --shard "$i/$count" --out "$folder/$i.jsonl" &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
