#!/usr/bin/env bash
# S1 Appendix A: the sweep over beta and the highest learning rate, after which the paper went on with 0.1 and 5e-7.
#
#     SCALE=demo bash recipes/s1_appendix_a.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: it prints no numbers of its sweep, and does not say on which model and pairs it was (here Llama and
# UltraFeedback's off-policy pairs) nor by what it chose (here AlpacaEval 2). The reference's log-probabilities are computed
# once. 15 trainings on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
default OUT "out/s1_appendix_a/${MODEL##*/}"
default BETAS "0.01 0.1 0.5 1 5" "0.01 0.1 1"
default RATES "5e-7 1e-6 5e-6" "2e-5 1e-4"
needs "$MODEL" "$REWARD"

python data/import_responses.py $OFF_POLICY --out "$OUT/off.jsonl"
on_gpus "$OUT/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT/off.jsonl"
python "$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl --on-ratio 0 $PAIRS --out "$OUT/off.pairs.jsonl"

results=() # in the order of the grid
for beta in $BETAS; do
  for rate in $RATES; do
    run=$OUT/beta_${beta}_lr_$rate
    train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$OUT/off.pairs.jsonl" --beta "$beta" --lr "$rate" --out "$run"
    win_rate "$run" "$run"
    results+=("$run.winrate.json" "$run"/metrics.*)
  done
done
python report/table.py "${results[@]}" --out "$OUT"
