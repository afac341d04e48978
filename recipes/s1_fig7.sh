#!/usr/bin/env bash
# S1 Fig. 7: how AlpacaEval 2's 805 prompts fall into WildChat's 16 categories. Not as in the paper: its question to the
# model is unpublished (here a numbered list, answered by a number), and its code splits labels at their commas, which makes 17 of them.
# No GPU; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
LABELER=${LABELER:-gpt-4o-mini}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json of the data set tatsu-lab/alpaca_eval
OUT=${OUT:-out/s1_fig7}

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/gpt4.jsonl"
python scorers/category.py --model "$LABELER" --responses "$OUT/gpt4.jsonl" --out "$OUT/categories.jsonl"
python report/figure.py shares "$OUT/categories.jsonl" --out "$OUT/fig7.png"
