#!/usr/bin/env bash
# S1 Fig. 4: the share of on-policy pairs, the total number fixed, with error bars, for one model.
#
#     SCALE=demo bash recipes/s1_fig4.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: it prints neither its shares (here those of its code) nor where its error bars come from (here three
# seeds, of the mixture and of the training; the figure draws their sd and the interval over prompts). 27 trainings on a
# node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy # and allenai/Llama-3.1-Tulu-3-8B-SFT
default OUT "out/s1_fig4/${MODEL##*/}"
default SHARES "0 0.2 0.3 0.4 0.5 0.6 0.7 0.8 1" "0 0.25 0.5 0.75 1"
setting SEEDS "0 1 2" 0
needs "$MODEL" "$REWARD"

python data/import_responses.py $OFF_POLICY --out "$OUT/off.jsonl"
on_gpus "$OUT/on" generate.py --model "$MODEL" --prompts "$OUT/off.jsonl"
on_gpus "$OUT/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT"/on/*.jsonl "$OUT/off.jsonl"

for share in $SHARES; do # every share of the same prompts, so the total is the same too
  for seed in $SEEDS; do
    run=$OUT/dpo_${share}_seed$seed
    python "$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl --on-ratio "$share" --seed "$seed" $PAIRS \
      --out "$run.pairs.jsonl"
    train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$run.pairs.jsonl" --seed "$seed" --out "$run"
    win_rate "$run" "$run"
  done
done
python report/figure.py ratio "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json --out "$OUT/fig4.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
