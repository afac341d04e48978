#!/usr/bin/env bash
# S1 Fig. 3, and Fig. 2 as differences: on- against off-policy DPO by category of the prompt and by length of the answer.
#
#     SCALE=demo bash recipes/s1_fig3.sh          (after recipes/s1_table2.sh at the same SCALE, whose verdicts it reads)
#
# Not as in the paper: it does not say where its bins end (here quarters of a model's answers, for differences of both
# models'), its text and captions disagree on win rates or length-controlled ones (here both), and the differences have
# paired intervals. No GPU.
source "$(dirname "$0")/settings.sh" || exit
default MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
default RUN "out/s1_table2/paper/${MODEL##*/}_ultrafeedback" "out/s1_table2/demo/${MODEL##*/}_demo"
default PAPER recipes/paper/s1_fig3.csv ""
default OUT "out/s1_fig3/$SCALE"
if [ "$SCALE" = demo ]; then
  against=(--baseline "$MODEL")
  objective=(facts how-to)
  open=(writing recommendation)
else
  against=(--baseline gpt4_1106_preview --lc-data "$ALPACA" ${N_EVAL:+--allow-missing})
  objective=("mathematical reasoning or calculation" coding)
  open=("assisting or creative writing" recommendation)
fi
for name in on off; do
  [ -e "${RUN}_$name.judged/0.jsonl" ] ||
    stop "${RUN}_$name.judged/0.jsonl does not exist; run bash recipes/s1_table2.sh at SCALE=$SCALE first"
done

for name in on off; do
  rates=(evaluate.py --scored "${RUN}_$name".judged/*.jsonl --model "${RUN}_$name" "${against[@]}")
  python "${rates[@]}" --out "$OUT/$name.winrate.json"
  python "${rates[@]}" --bins-of "${objective[@]}" --out "$OUT/objective/$name.winrate.json"
  python "${rates[@]}" --bins-of "${open[@]}" --out "$OUT/open/$name.winrate.json"
done
# evaluate.py has refused more than 1 % of prompts without a verdict; the rest of them is compared
difference=(report/compare.py --first "${RUN}_on" --second "${RUN}_off" "${against[@]}" --allow-missing)
python "${difference[@]}" --categories --length-bins "${objective[@]}" --out "$OUT/objective/on_minus_off.json"
python "${difference[@]}" --categories --length-bins "${open[@]}" --out "$OUT/open/on_minus_off.json"
python report/figure.py categories "$OUT"/{on,off}.winrate.json --out "$OUT/fig2.png"
for name in objective open; do # the lengths of answers to two categories of prompts
  python report/figure.py lengths "$OUT/$name"/{on,off}.winrate.json --out "$OUT/fig3_$name.png"
done
python report/table.py "$OUT"/{on,off}.winrate.json ${PAPER:+--paper "$PAPER"} --out "$OUT"
