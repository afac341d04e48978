#!/usr/bin/env bash
# S2 Tables 1, 3, 4, 5, 8 and Fig. 3 for one model and loss: two iterations in all four orders of off- and on-policy pairs, labelled by
# PairRM, and each start model's boundary score on 2,000 held-out prompts. Not as in the paper: the score is V_on / (V_on + V_off), as its
# Algorithm 1 and numbers have it (Table 3's caption turns it round), gains and Delta are computed (several printed ones are wrong), answers
# to AlpacaEval are greedy and SLiC's constants ours (neither is given). 4 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}  # and alignment-handbook/zephyr-7b-sft-full; the other three come from s2_sft.sh
MAX_TOKENS=${MAX_TOKENS:-2048}  # 1024 for Phi-2 and Pythia, which read 2,048 tokens in all
LOSS=${LOSS:-dpo}  # Table 5: slic, or hinge: "SLiC-HF loss" can be read both ways
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s2_stages/${MODEL##*/}_$LOSS}
GPUS=${GPUS:-4}

train() { # START PAIRS OUT
  case $LOSS in
    dpo) torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s2 --loss dpo --model "$1" --pairs "$2" --out "$3" ;;
    slic) torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s2 --loss slic --model "$1" --pairs "$2" --out "$3" ;;
    hinge) torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s2 --loss hinge --model "$1" --pairs "$2" --out "$3" ;;
  esac
}
iteration() { # START: its boundary score, pairs of its own, and a model from either kind of pairs with START as the reference
  local start=$OUT/${1##*/}
  python generate.py --preset s2 --max-tokens "$MAX_TOKENS" --model "$1" --prompts "$OUT/test.jsonl" --out "${start}_test.jsonl"
  python scorers/pairrm.py --model llm-blender/PairRM-hf --responses "${start}_test.jsonl" "$OUT/test.jsonl" \
    --out "${start}_test_wins.jsonl"
  python score.py --scorer logp --model "$1" --responses "${start}_test_wins.jsonl" --out "${start}_test_logp.jsonl"
  python boundary.py --scored "${start}_test_logp.jsonl" --out "$start.boundary.json"
  python generate.py --preset s2 --max-tokens "$MAX_TOKENS" --model "$1" --prompts "$OUT/off.jsonl" --out "${start}_on.jsonl"
  python scorers/pairrm.py --model llm-blender/PairRM-hf --responses "${start}_on.jsonl" --out "${start}_wins.jsonl"
  python build_pairs.py --scored "${start}_wins.jsonl" --on-ratio 1 --out "$start-on.pairs.jsonl"
  train "$1" "$OUT/off.pairs.jsonl" "$start-off"
  train "$1" "$start-on.pairs.jsonl" "$start-on"
}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --split test_prefs \
  --out "$OUT/test.jsonl"
python scorers/pairrm.py --model llm-blender/PairRM-hf --responses "$OUT/off.jsonl" --out "$OUT/off_wins.jsonl"
python build_pairs.py --scored "$OUT/off_wins.jsonl" --select relabel --on-ratio 0 --out "$OUT/off.pairs.jsonl"

base=$OUT/${MODEL##*/}
iteration "$MODEL"
iteration "$base-off"
iteration "$base-on"
python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for model in "$MODEL" "$base"-{off,on,off-off,off-on,on-off,on-on}; do
  name=$OUT/${model##*/}
  python generate.py --greedy --max-tokens "$MAX_TOKENS" --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$name.answers.jsonl"
  python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
    --responses "$OUT/alpaca.jsonl" "$name.answers.jsonl" --out "$name.judged.jsonl"
  python evaluate.py winrate --scored "$name.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
    --out "$name.winrate.json"
done
name=${base##*/}
python report/figure.py training "$base"-*/metrics.jsonl --out "$OUT/fig3.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.boundary.json "$OUT"/*.pairs.meta.json "$base"-*/metrics.* --start "$name" \
  --delta "$name" "$name-off" "$name-on" --delta "$name-off" "$name-off-off" "$name-off-on" \
  --delta "$name-on" "$name-on-off" "$name-on-on" --out "$OUT"
