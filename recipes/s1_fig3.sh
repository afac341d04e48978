#!/usr/bin/env bash
# S1 Fig. 3, and Fig. 2 as differences: on- against off-policy DPO by category of the prompt and by length of the answer.
#
#     SCALE=demo bash recipes/s1_fig3.sh          (after recipes/s1_table2.sh at the same SCALE, whose verdicts it reads)
#
# Not as in the paper: it does not say where its bins end (here quarters of both models' answers), its text and captions
# disagree on win rates or length-controlled ones (here both), and the differences have paired intervals. No GPU.
source "$(dirname "$0")/settings.sh"
OUT=${OUT:-out/s1_fig3/$SCALE}
if [ "$SCALE" = demo ]; then
  RUN=${RUN:-out/s1_table2/demo/${MODEL##*/}_demo}
  verdicts=("$RUN"_{on,off}.judged/0.jsonl)
  against=(--baseline "$MODEL")
  objective=(facts how-to)
  open=(writing recommendation)
  PAPER=()
else
  RUN=${RUN:-out/s1_table2/paper/Llama-3.1-8B-Instruct_ultrafeedback}
  verdicts=("$RUN"_{on,off}.judged.jsonl)
  against=(--baseline gpt4_1106_preview --lc-data "$ALPACA")
  objective=("mathematical reasoning or calculation" coding)
  open=("assisting or creative writing" recommendation)
  PAPER=(--paper recipes/paper/s1_fig3.csv)
fi
for file in "${verdicts[@]}"; do
  [ -e "$file" ] || stop "there is no $file; run bash recipes/s1_table2.sh at SCALE=$SCALE first"
done

compare=(evaluate.py winrate --scored "${verdicts[@]}" --model "${RUN}_on" --minus "${RUN}_off" "${against[@]}")
python "${compare[@]}" --out "$OUT/on.winrate.json"
python "${compare[@]}" --bins-of "${objective[@]}" --out "$OUT/on_objective.winrate.json"
python "${compare[@]}" --bins-of "${open[@]}" --out "$OUT/on_open.winrate.json"
python report/figure.py categories "$OUT/on.winrate.json" --out "$OUT/fig2.png"
for name in on_objective on_open; do # the lengths of answers to two categories of prompts
  python report/figure.py lengths "$OUT/$name.winrate.json" --out "$OUT/fig3_$name.png"
done
python report/table.py "$OUT"/{on,on_objective,on_open}.winrate.json "${PAPER[@]}" --out "$OUT"
