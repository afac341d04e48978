#!/usr/bin/env bash
# S2 Tables 1, 3, 4, 5, 8 and Fig. 3 for one model and loss: two iterations in all orders of off- and on-policy pairs, which
# PairRM labels, and the boundary score of every model that an iteration begins with, on 2,000 held-out prompts.
#
#     SCALE=demo bash recipes/s2_stages.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: the score is V_on / (V_on + V_off), as its Algorithm 1 and numbers have it (Table 3's caption turns
# it round); answers to AlpacaEval are greedy and SLiC's constants ours (it gives neither). Some printed numbers contradict
# its own LC rates, from which the numbers in parentheses follow: Table 4, Qwen off-off, gain +3.86 (+2.03), delta 9.41
# (4.95); Table 5, Llama off +4.38 (+4.29), 0.68 (0.66), off-on -11.93 (-16.22), Zephyr off-off 0.38 (0.51); Table 3's minus
# signs of Llama's gains. 6 trainings on a node of 8 x 80 GB; not run there. Demo: the paper's numbers in the table are
# Zephyr's.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Meta-Llama-3-8B-Instruct out/models/policy # and Zephyr, out/s2_sft/phi-2, ...
setting LOSS dpo # Table 5: slic, or hinge: "SLiC-HF loss" can be read both ways
setting SEED 0
setting PAIRS "$PAIRS" "--total $((N_PAIRS * 3 / 4))" # of prompts with two samples, of which one is often cut off
default OUT "out/s2_stages/${MODEL##*/}_$LOSS"
default STARTS "$MODEL $OUT/off $OUT/on" # an iteration begins with each of these
start=${MODEL##*/} s2=(--preset s2 --seed "$SEED") chat=()
default PAPER "recipes/paper/s2_stages_${start}_${LOSS/hinge/slic}.csv" recipes/paper/s2_stages_zephyr-7b-sft-full_dpo.csv
case $start in
  phi-2 | pythia-*) SAMPLE="--max-tokens 1024 $SAMPLE" ;; # they read 2,048 tokens in all
  Qwen3-*) chat=(--template-kwargs '{"enable_thinking":false}') SAMPLE="${chat[*]} $SAMPLE" ;;
esac
needs "$MODEL" "$(model_of $PREFERENCE)"
dpo=("$TRAIN_SCRIPT" "${s2[@]}" --loss "$LOSS" "${chat[@]}")

python data/import_responses.py $OFF_POLICY --out "$OUT/off_policy.jsonl"
if [ "$SCALE" = demo ]; then
  sed "1,${N_PROMPTS}d; $((N_PROMPTS + 64))q" data/train.jsonl >"$OUT/held_out_rows.jsonl" # the next 64
  python data/import_responses.py --format rows --data "$OUT/held_out_rows.jsonl" --out "$OUT/held_out.jsonl"
else
  python data/import_responses.py $OFF_POLICY --split test_prefs --out "$OUT/held_out.jsonl"
fi
on_gpus "$OUT/scored" $PREFERENCE --responses "$OUT/off_policy.jsonl"
python "$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl --select relabel --on-ratio 0 $PAIRS \
  --out "$OUT/off.pairs.jsonl"

win_rate "$MODEL" "$OUT/$start"
deltas=()
for model in $STARTS; do
  name=$OUT/${model##*/}
  on_gpus "$name.held_out" generate.py "${s2[@]}" --model "$model" --prompts "$OUT/held_out.jsonl"
  on_gpus "$name.held_out_scored" $PREFERENCE --responses "$name".held_out/*.jsonl "$OUT/held_out.jsonl"
  on_gpus "$name.held_out_logp" scorers/logp.py --model "$model" --responses "$name".held_out_scored/*.jsonl
  python boundary.py --scored "$name".held_out_logp/*.jsonl --out "$name.boundary.json"

  on_gpus "$name.own" generate.py "${s2[@]}" --model "$model" --prompts "$OUT/off_policy.jsonl"
  on_gpus "$name.own_scored" $PREFERENCE --responses "$name".own/*.jsonl
  if [ "$model" = "$MODEL" ]; then off=off on=on; else off=${model##*/}-off on=${model##*/}-on; fi # off-on: off, then on
  python "$PAIRS_SCRIPT" --scored "$name".own_scored/*.jsonl --on-ratio 1 $PAIRS --out "$OUT/$on.pairs.jsonl"
  train "${dpo[@]}" --model "$model" --pairs "$OUT/off.pairs.jsonl" --out "$OUT/$off"
  train "${dpo[@]}" --model "$model" --pairs "$OUT/$on.pairs.jsonl" --out "$OUT/$on"
  for run in "$off" "$on"; do win_rate "$OUT/$run" "$OUT/$run"; done
  deltas+=(--delta "${model##*/}" "$off" "$on")
done
python report/figure.py training "$OUT"/*/metrics.jsonl --out "$OUT/fig3.png"
if [ -e "$PAPER" ]; then deltas+=(--paper "$PAPER"); fi
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* --start "$start" "${deltas[@]}" --out "$OUT"
