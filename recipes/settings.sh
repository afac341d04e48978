# Sourced by the recipes: where they run and at which of two scales, and the steps that most of them share.
#
#     JUDGE=gpt-4o bash recipes/s1_fig4.sh        paper: models and data of the hub, a judge, a node of 8 x 80 GB
#     SCALE=demo bash recipes/s1_fig4.sh          demo: on what demo.sh made, no hub, minutes on 2 cores
#
# Every name in capitals can be set from outside (recipes/README.md), and the same command resumes a killed run.
#
# paper  the papers' judge, gpt-4-1106-preview, is reported shut down, so JUDGE must be given: win rates under another
#        judge can be compared with each other, not with the papers' numbers
# demo   SmolLM2-135M-Instruct, 64 prompts of our own, 48 tokens, 32 pairs, one seed. A cross-encoder stands in for the
#        reward model, for PairRM and for the judge, the start model for GPT-4's answers; no benchmarks
set -euo pipefail
outside=" " # names that are set, and not to nothing
for name in $(compgen -v); do [ -z "${!name:-}" ] || outside+="$name "; done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1} # huge pages: a tenth faster on a CPU
SCALE=${SCALE:-paper}

stop() { # SENTENCE
  echo "${0##*/}: $*" >&2
  exit 2
}

default() { # NAME PAPER [DEMO]: sets NAME for the scale, DEMO being PAPER if it is not given, unless it is set from outside
  local value=$2
  if [ "$SCALE" = demo ]; then value=${3-$2}; fi
  if [[ $outside != *" $1 "* ]]; then printf -v "$1" %s "$value"; fi
}

setting() { # NAME PAPER [DEMO]: a default that is one for all that OUT has; see same_settings
  settings+=("$1")
  default "$@"
}

case $SCALE in paper | demo) ;; *) stop "SCALE must be paper or demo, found $SCALE" ;; esac
settings=(recipe SCALE)
recipe=${0##*/}
setting PAIRS_SCRIPT build_pairs.py # or a copy
setting TRAIN_SCRIPT train_dpo.py
setting SCORE_SCRIPT score.py
setting REWARD Skywork/Skywork-Reward-Gemma-2-27B-v0.2 out/models/reward
setting N_PROMPTS "" 64 # "" is all
setting N_PAIRS "" 32
setting N_EVAL "" 64 # prompts of the evaluation
limit=${N_PROMPTS:+--limit $N_PROMPTS}
# Words, which are split at blanks: where the responses of others are, a scorer, and flags that every call of a stage gets
setting OFF_POLICY "--format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized $limit" \
  "--format rows --data data/train.jsonl $limit"
setting PREFERENCE "scorers/pairrm.py --model llm-blender/PairRM-hf" "$SCORE_SCRIPT --model $REWARD"
setting SAMPLE "" "--max-tokens 48 --dtype float32 --backend hf"
setting PAIRS "${N_PAIRS:+--total $N_PAIRS}"
setting TRAIN --activation-checkpointing "--batch-size 4 --lr 2e-5 --dtype float32"
setting ANSWER "generate.py --greedy" # how a model answers the evaluation prompts
# At SCALE=paper only
default JUDGE ""
default LABELER "" # a model that names the category of AlpacaEval's prompts, for rates by category
default GPUS 8
# alpaca_eval_gpt4_baseline.json and df_gamed.csv of the hub's tatsu-lab/alpaca_eval, alpaca_eval_clf.txt of the package
default ALPACA alpaca_eval

needs() { # MODEL ...: ends the run, before anything is sampled, if what it needs cannot be had or OUT has other settings
  local name why
  for name in OUT MODEL REWARD PAIRS_SCRIPT TRAIN_SCRIPT SCORE_SCRIPT; do
    [[ ${!name:-} != *[[:blank:]]* ]] || stop "$name=${!name} has a blank, where lists are split; use a path without"
  done
  for name in PAIRS_SCRIPT TRAIN_SCRIPT SCORE_SCRIPT; do
    [ -f "${!name}" ] || stop "$name=${!name} does not exist in $PWD; give the path of a copy of the stage, from there"
  done
  if [ "$SCALE" = paper ]; then
    settings+=(JUDGE LABELER)
    [ "$JUDGE" ] || stop "JUDGE is not set; give the model that judges, as in JUDGE=gpt-4o, or use SCALE=demo"
    [ "${OPENAI_API_KEY:-}${OPENAI_BASE_URL:-}" ] ||
      stop "OPENAI_API_KEY is not set; set it, or OPENAI_BASE_URL for a server of your own"
    for name in alpaca_eval_gpt4_baseline.json df_gamed.csv alpaca_eval_clf.txt; do
      [ -e "$ALPACA/$name" ] || stop "$ALPACA/$name does not exist; set ALPACA to the folder with AlpacaEval's files"
    done
  fi
  for name in "$@"; do
    if [ "$SCALE" = demo ] && [[ $name = out/models/* ]] && [ ! -e "$name/config.json" ]; then
      stop "SCALE=demo needs the models that demo.sh makes; run bash demo.sh first"
    fi
    if [ -z "$name" ] || [ -e "$name" ]; then continue; fi
    why=$(on_hub "$name")
    [ -z "$why" ] || stop "$name: $why"
  done
  same_settings
}

same_settings() { # or stop: OUT/settings.txt has those of its pairs and win rates; tables would mix or average both
  local name before now results
  mkdir -p "$OUT"
  exec 9>"$OUT/.lock" # held until the recipe and what it started have ended
  flock -n 9 || stop "another recipe runs in $OUT; wait for its end, or use another OUT"
  now=$(for name in "${settings[@]}"; do echo "$name=${!name}$(code_of "$name")"; done | sort -u)
  results=$(find "$OUT/" -maxdepth 1 -name "*.pairs.meta.json" -o -name "*.winrate.json")
  if [ -z "$results" ] || [ ! -e "$OUT/settings.txt" ]; then echo "$now" >"$OUT/settings.txt"; fi
  before=$(grep -vxFe "$now" "$OUT/settings.txt" | paste -sd, | sed 's/,/, /g' || true)
  now=$(grep -vxFf "$OUT/settings.txt" <<<"$now" | paste -sd, | sed 's/,/, /g' || true)
  [ "$before" = "$now" ] || stop "$OUT/settings.txt has ${before:-none}, this run has ${now:-none}; use another OUT"
}

code_of() { # NAME: prints the beginning of the sha256 of a script that a name gives; an edited copy makes other results
  case $1 in PAIRS_SCRIPT | TRAIN_SCRIPT | SCORE_SCRIPT) echo " $(sha256sum "${!1}" | cut -c 1-12)" ;; esac
}

model_of() { # WORDS: prints what follows --model, or nothing
  local words=" $*"
  words=${words##* --model }
  echo "${words%% *}"
}

on_hub() { # MODEL: prints why a gated, misspelt or unreachable one cannot be had
  python - "$1" <<'END'
import sys
from huggingface_hub import hf_hub_download

try:
    hf_hub_download(sys.argv[1], "config.json")
except Exception as error:  # the library has many, for gated, unknown and unreachable models
    print(*str(error).split())
END
}

on_gpus() { # FOLDER SCRIPT FLAGS: samples or scores, a process per GPU; writes FOLDER/0.jsonl, FOLDER/1.jsonl, ...
  local folder=$1 script=$2
  shift 2
  case $script in generate.py | recipes/sample_* | "${ANSWER%% *}") set -- $SAMPLE "$@" ;; esac
  if [ "$SCALE" = demo ]; then
    python "$script" "$@" --out "$folder/0.jsonl"
  else
    bash recipes/on_all_gpus.sh "$folder" python "$script" "$@"
  fi
}

train() { # SCRIPT FLAGS: TRAIN_SCRIPT or recipes/train_online.py, on all GPUs together
  local script=$1
  shift
  if [ "$SCALE" = demo ]; then
    python "$script" $TRAIN "$@"
  else
    torchrun --nproc-per-node "$GPUS" "$script" $TRAIN "$@"
  fi
}

win_rate() { # MODEL NAME: NAME.winrate.json; against GPT-4's answers by the judge, or the start model's by the reward
  local model=$1 name=$2 prompts=$OUT/alpaca.jsonl start=${baseline:-$OUT/start}
  if [ "$SCALE" = demo ]; then
    if [ "$model" = "$MODEL" ]; then return; fi # the report gives the baseline its 50
    on_gpus "$start.answers" $ANSWER --model "$MODEL" --prompts data/eval.jsonl --limit "$N_EVAL"
    on_gpus "$name.answers" $ANSWER --model "$model" --prompts data/eval.jsonl --limit "$N_EVAL"
    on_gpus "$name.judged" "$SCORE_SCRIPT" --model "$REWARD" --responses "$start".answers/*.jsonl "$name".answers/*.jsonl
    python evaluate.py --scored "$name".judged/*.jsonl --model "$model" --baseline "$MODEL" \
      --out "$name.winrate.json"
  else
    python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" \
      ${N_EVAL:+--limit "$N_EVAL"} --out "$prompts"
    if [ "${LABELER// /}" ]; then
      python scorers/category.py --model "$LABELER" --responses "$prompts" --out "$OUT/categories.jsonl"
      prompts=$OUT/categories.jsonl
    fi
    on_gpus "$name.answers" $ANSWER ${answer_seed:+--seed "$answer_seed"} --model "$model" --prompts "$prompts"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$prompts" "$name".answers/*.jsonl --out "$name.judged/0.jsonl"
    python evaluate.py --scored "$name.judged/0.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      ${N_EVAL:+--allow-missing} --out "$name.winrate.json"
  fi
}

s3_settings() {
  setting PAIRS_SCRIPT recipes/s3_pairs.py # or a copy of it
  setting ANSWER "recipes/sample_beams.py --beams 3" "generate.py --greedy"
  setting S3 "--preset s3" "--preset s3 --epochs 1" # of a training
  setting SEEDS "0 1 2" 0
}

train_s3() { # NAME ...: a training with the flags S3 per seed on OUT/NAME.pairs.jsonl, OUT/NAME_seed0, ...; answers by beams
  local name run seed
  for seed in $SEEDS; do
    if [ "$SCALE" = paper ]; then answer_seed=$seed; fi # of beams; greedy answers have none
    for name in "$@"; do
      run=$OUT/${name}_seed$seed
      train "$TRAIN_SCRIPT" $S3 --seed "$seed" --model "$MODEL" --pairs "$OUT/$name.pairs.jsonl" --out "$run"
      win_rate "$run" "$run"
      benchmarks "$run" "$run" what-matters
    done
  done
}

benchmarks() { # MODEL NAME SUITE: NAME.benchmarks.json
  if [ "$SCALE" = demo ]; then
    echo "SCALE=demo: no benchmarks for $1" >&2
  elif [ ! -e "$2.benchmarks.json" ]; then
    python recipes/benchmarks.py --model "$1" --suite "$3" --out "$2.benchmarks.json"
  fi
}
