#!/usr/bin/env bash
# S1 Fig. 7: how AlpacaEval 2's 805 prompts fall into WildChat's 16 categories.
#
#     SCALE=demo bash recipes/s1_fig7.sh          (the demo's prompts, by the categories that they were written for)
#
# Not as in the paper: its question to the model is unpublished (here a numbered list, answered by a number), and its code
# splits the labels at their commas, so that it has 17. No GPU; not run there.
source "$(dirname "$0")/settings.sh" || exit
default LABELER gpt-4o-mini # with the key in OPENAI_API_KEY
default OUT "out/s1_fig7/$SCALE"

if [ "$SCALE" = demo ]; then
  python report/figure.py shares data/train.jsonl data/eval.jsonl --out "$OUT/fig7.png"
else
  answers=$ALPACA/alpaca_eval_gpt4_baseline.json
  python data/import_responses.py --format alpaca_eval --data "$answers" ${N_EVAL:+--limit "$N_EVAL"} --out "$OUT/prompts.jsonl"
  python scorers/category.py --model "$LABELER" --responses "$OUT/prompts.jsonl" --out "$OUT/AlpacaEval.jsonl"
  python report/figure.py shares "$OUT/AlpacaEval.jsonl" --out "$OUT/fig7.png"
fi
