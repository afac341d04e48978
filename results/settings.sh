# Sourced by results/NAME/run.sh: the sizes of the experiments, and what turns runs into the files of a folder.
#
# 200 training and 200 evaluation prompts, 96 pairs, three seeds: results/README.md tells why. One thread a process, since
# two experiments at a time on two cores take a third less than one after the other on both.
set -euo pipefail
NAME=$(basename "$(realpath "$(dirname "$0")")")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
export SCALE=demo N_PROMPTS=200 N_PAIRS=96 N_EVAL=200 SEEDS="0 1 2" OMP_NUM_THREADS=1
RUNS=${RUNS:-out/results}/$NAME # models, answers, rewards; the folder of this file keeps what is small
KEPT=${KEPT:-results}/$NAME
BASELINE=out/models/policy
VERIFIABLE=verifiable=arithmetic,counting,spelling
OPEN=open=facts,how-to,explanation,recommendation,writing
TASTE=taste=recommendation,writing
mkdir -p "$KEPT"

verify() { # RUN ...: the share of right answers among the prompts that have one, RUN.verified/0.jsonl
  local run
  for run in "$@"; do
    grep '"answer"' "${run%/*}/start.answers/0.jsonl" >"$run.verifiable_start.jsonl"
    grep '"answer"' "$run.answers/0.jsonl" >"$run.verifiable.jsonl"
    python scorers/verify.py --responses "$run".verifiable*.jsonl --out "$run.verified/0.jsonl"
  done
}

compare() { # NAME FIRST ... [--second SECOND ...]: NAME.json by the reward, NAME.verified.json by right answers
  local name=$1
  shift
  local flags=(--first "$@" --baseline "$BASELINE")
  python report/compare.py "${flags[@]}" --group "$OPEN" --group "$TASTE" --group "$VERIFIABLE" --out "$KEPT/$name.json"
  python report/compare.py "${flags[@]}" --ending verified --out "$KEPT/$name.verified.json"
}

keep() { # FOLDER: win rates, boundaries, records of pairs, tables and figures of a recipe
  local file
  cp "$1"/*.winrate.json "$1"/*.pairs.meta.json "$1"/{report.md,settings.csv} "$KEPT"
  for file in "$1"/*.boundary.json "$1"/*.png; do
    if [ -e "$file" ]; then cp "$file" "$KEPT"; fi
  done
}
