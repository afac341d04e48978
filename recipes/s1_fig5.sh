#!/usr/bin/env bash
# S1 Fig. 5: only off-policy pairs, filtered by quality, on-policiness, contrast or similarity, five shares kept of each.
#
#     SCALE=demo bash recipes/s1_fig5.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: its embedding model, pooling and the normalisation of log-probabilities are not given. Here the model
# that is trained embeds (mean of its last states over the answer), and log-probabilities are sums, which favours short
# pairs (report.md has their lengths). Quality is the reward model's, as the text says; its code takes GPT-4's. 20 trainings
# on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
default OUT "out/s1_fig5/${MODEL##*/}"
default FILTERS "quality onpolicy contrast similarity" "quality onpolicy similarity"
default SHARES "0.1 0.2 0.3 0.4 0.5" "0.25 0.5"
setting N_PAIRS "" # all
setting PAIRS "${N_PAIRS:+--total $N_PAIRS}"
needs "$MODEL" "$REWARD"

python data/import_responses.py $OFF_POLICY --out "$OUT/off.jsonl"
on_gpus "$OUT/rewards" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT/off.jsonl"
on_gpus "$OUT/logps" scorers/logp.py --model "$MODEL" --responses "$OUT"/rewards/*.jsonl
on_gpus "$OUT/scored" scorers/embed.py --model "$MODEL" --responses "$OUT"/logps/*.jsonl

for filter in $FILTERS; do
  for share in $SHARES; do # of all pairs
    run=$OUT/${filter}_$share
    python "$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl --on-ratio 0 --filter "$filter:$share" $PAIRS \
      --out "$run.pairs.jsonl"
    train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$run.pairs.jsonl" --out "$run"
    win_rate "$run" "$run"
  done
done
python report/figure.py filters "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json --out "$OUT/fig5.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
