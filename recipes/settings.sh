# Sourced by the recipes: where they run and at which of two scales, and the steps that most of them share.
#
#     JUDGE=gpt-4o bash recipes/s1_fig4.sh        paper: models and data of the hub, a judge, a node of 8 x 80 GB
#     SCALE=demo bash recipes/s1_fig4.sh          demo: on what demo.sh made, no hub, minutes on 2 cores
#
# Every name in capitals can be set from outside, and the same command resumes a killed run.
#
# paper  the papers' judge, gpt-4-1106-preview, is reported shut down, so JUDGE must be given: win rates under another
#        judge can be compared with each other, not with the papers' numbers
# demo   SmolLM2-135M-Instruct, 64 prompts of our own, 48 tokens, 32 pairs, one seed; N_PROMPTS, N_PAIRS and N_EVAL, the
#        prompts of the evaluation, are for sizes between. A cross-encoder stands in for the reward model, for PairRM and
#        for the judge, the start model for GPT-4's answers; no benchmarks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
export THP_MEM_ALLOC_ENABLE=1 # huge pages: a tenth faster on a CPU
SCALE=${SCALE:-paper}

stop() { # SENTENCE
  echo "${0##*/}: $*" >&2
  exit 2
}

case $SCALE in
  paper)
    REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
    PREFERENCE=(scorers/pairrm.py --model llm-blender/PairRM-hf)
    OFF_POLICY=(--format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized)
    SEEDS=${SEEDS:-0 1 2}
    GPUS=${GPUS:-8}
    JUDGE=${JUDGE:-}
    # alpaca_eval_gpt4_baseline.json and df_gamed.csv of the hub's tatsu-lab/alpaca_eval, alpaca_eval_clf.txt of the package
    ALPACA=${ALPACA:-alpaca_eval}
    LABELER=${LABELER:-} # a model that names the category of AlpacaEval's prompts, for rates by category
    PAIRS=()
    SAMPLE=()
    ;;
  demo)
    MODEL=${MODEL:-out/models/policy}
    REWARD=${REWARD:-out/models/reward}
    PREFERENCE=(score.py --model "$REWARD")
    N_PROMPTS=${N_PROMPTS:-64} N_PAIRS=${N_PAIRS:-32} N_EVAL=${N_EVAL:-64}
    OFF_POLICY=(--format rows --data data/train.jsonl --limit "$N_PROMPTS")
    SEEDS=${SEEDS:-0}
    PAIRS=(--total "$N_PAIRS")
    FEWER_PAIRS=(--total $((N_PAIRS * 3 / 4))) # of prompts with two samples, of which one is often cut off
    SAMPLE=(--max-tokens 48 --dtype float32 --backend hf)
    ;;
  *) stop "SCALE must be paper or demo, found $SCALE" ;;
esac

ANSWER=(generate.py --greedy) # how a model answers the evaluation prompts

needs() { # MODEL ...: ends the run, before anything is sampled, if a model, the judge or AlpacaEval's files cannot be had
  local name why
  if [ "$SCALE" = demo ]; then
    [ -e out/models/reward/config.json ] || stop "SCALE=demo needs the models that demo.sh makes; run bash demo.sh first"
  else
    [ "$JUDGE" ] || stop "JUDGE is not set; give the model that judges, as in JUDGE=gpt-4o, or use SCALE=demo"
    [ "${OPENAI_API_KEY:-}${OPENAI_BASE_URL:-}" ] ||
      stop "OPENAI_API_KEY is not set; set it, or OPENAI_BASE_URL for a server of your own"
    for name in alpaca_eval_gpt4_baseline.json df_gamed.csv alpaca_eval_clf.txt; do
      [ -e "$ALPACA/$name" ] || stop "$ALPACA/$name does not exist; set ALPACA to the folder with AlpacaEval's files"
    done
  fi
  for name in "$@"; do
    if [ -d "$name" ]; then continue; fi
    why=$(on_hub "$name")
    [ -z "$why" ] || stop "$name: $why"
  done
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
  case $script in generate.py | recipes/sample_*) set -- "${SAMPLE[@]}" "$@" ;; esac
  if [ "$SCALE" = demo ]; then
    python "$script" "$@" --out "$folder/0.jsonl"
  else
    bash recipes/on_all_gpus.sh "$folder" python "$script" "$@"
  fi
}

train() { # SCRIPT FLAGS: train_dpo.py or recipes/train_online.py, on all GPUs together
  local script=$1
  shift
  if [ "$SCALE" = demo ]; then
    python "$script" --batch-size 4 --lr 2e-5 --dtype float32 "$@"
  else
    torchrun --nproc-per-node "$GPUS" "$script" --activation-checkpointing "$@"
  fi
}

win_rate() { # MODEL NAME: NAME.winrate.json; against GPT-4's answers by the judge, or the start model's by the reward
  local model=$1 name=$2 prompts=$OUT/alpaca.jsonl
  if [ "$SCALE" = demo ]; then
    if [ "$model" = "$MODEL" ]; then return; fi # the report gives the baseline its 50
    on_gpus "$OUT/start.answers" "${ANSWER[@]}" --model "$MODEL" --prompts data/eval.jsonl --limit "$N_EVAL"
    on_gpus "$name.answers" "${ANSWER[@]}" --model "$model" --prompts data/eval.jsonl --limit "$N_EVAL"
    on_gpus "$name.judged" score.py --model "$REWARD" --responses "$OUT"/start.answers/*.jsonl "$name".answers/*.jsonl
    python evaluate.py --scored "$name".judged/*.jsonl --model "$model" --baseline "$MODEL" \
      --out "$name.winrate.json"
  else
    python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" \
      --out "$prompts"
    if [ "$LABELER" ]; then
      python scorers/category.py --model "$LABELER" --responses "$prompts" --out "$OUT/categories.jsonl"
      prompts=$OUT/categories.jsonl
    fi
    on_gpus "$name.answers" "${ANSWER[@]}" --model "$model" --prompts "$prompts"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$prompts" "$name".answers/*.jsonl --out "$name.judged/0.jsonl"
    python evaluate.py --scored "$name.judged/0.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      --out "$name.winrate.json"
  fi
}

train_s3() { # NAME ...: a training with the flags S3 per seed on OUT/NAME.pairs.jsonl, OUT/NAME_seed0, ...; answers by beams
  local name run seed
  for seed in $SEEDS; do
    if [ "$SCALE" = paper ]; then ANSWER=(recipes/sample_beams.py --beams 3 --seed "$seed"); fi
    for name in "$@"; do
      run=$OUT/${name}_seed$seed
      train train_dpo.py "${S3[@]}" --seed "$seed" --model "$MODEL" --pairs "$OUT/$name.pairs.jsonl" --out "$run"
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
