#!/usr/bin/env bash
# S1 Fig. 6: the model itself, SimpleMix, and SimpleMix of the best 0.4 of the off-policy pairs and as many on-policy ones.
#
#     SCALE=demo bash recipes/s1_fig6.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: it does not say from which prompts the on-policy pairs come (here from those whose off-policy pair is
# left out), and it compares sets of unequal sizes. Here mix is SimpleMix, high has the best off-policy pairs, and same_size
# is SimpleMix with as many pairs as high. 3 trainings on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
default OUT "out/s1_fig6/${MODEL##*/}"
setting N_PAIRS "" # all
setting PAIRS "${N_PAIRS:+--total $N_PAIRS}"
needs "$MODEL" "$REWARD"

python data/import_responses.py $OFF_POLICY --out "$OUT/off.jsonl"
on_gpus "$OUT/on" generate.py --model "$MODEL" --prompts "$OUT/off.jsonl"
on_gpus "$OUT/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT"/on/*.jsonl "$OUT/off.jsonl"

half=("$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl --on-ratio 0.5)
python "${half[@]}" $PAIRS --out "$OUT/mix.pairs.jsonl"
python "${half[@]}" --filter quality:0.4 $PAIRS --out "$OUT/high.pairs.jsonl"
total=$(wc -l <"$OUT/high.pairs.jsonl")
python "${half[@]}" $PAIRS --total "$total" --out "$OUT/same_size.pairs.jsonl"

win_rate "$MODEL" "$OUT/${MODEL##*/}"
for name in mix high same_size; do
  run=$OUT/$name
  train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$run.pairs.jsonl" --out "$run"
  win_rate "$run" "$run"
done
python report/figure.py settings "$OUT"/*.winrate.json --out "$OUT/fig6.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --start "${MODEL##*/}" --out "$OUT"
