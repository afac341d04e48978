#!/usr/bin/env bash
# S1 Fig. 3, and Fig. 2 as differences: on- against off-policy DPO by category of prompt and by length of the answer, from the verdicts of
# s1_table2.sh. Not as in the paper: it does not say where its bins end (here quarters of both models' answers), its text and captions
# disagree on win rates or length-controlled ones (here both), and the differences have paired intervals. Not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
ALPACA=${ALPACA:-alpaca_eval}  # as in s1_table2.sh
RUN=${RUN:-out/s1_table2/ultrafeedback/Llama-3.1-8B-Instruct}
OUT=${OUT:-out/s1_fig3}
on=$RUN/eval/dpo_1.judged.jsonl off=$RUN/eval/dpo_0.judged.jsonl

python evaluate.py winrate --scored "$on" "$off" --model "$RUN/dpo_1" --minus "$RUN/dpo_0" \
  --baseline gpt4_1106_preview --lc-data "$ALPACA" --bins-of "mathematical reasoning or calculation" coding --out "$OUT/objective.winrate.json"
python evaluate.py winrate --scored "$on" "$off" --model "$RUN/dpo_1" --minus "$RUN/dpo_0" \
  --baseline gpt4_1106_preview --lc-data "$ALPACA" --bins-of "assisting or creative writing" recommendation \
  --out "$OUT/open.winrate.json"
python report/figure.py lengths "$OUT"/*.winrate.json --out "$OUT/fig3.png"
python report/figure.py categories "$OUT/objective.winrate.json" --out "$OUT/fig2.png"
python report/table.py "$OUT"/*.winrate.json --out "$OUT"
