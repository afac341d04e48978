#!/usr/bin/env bash
# S3 Table 4: 0, 10 and 20 % of UltraFeedback's off-policy pairs take in the best of eight answers of the model; two bases.
#
#     SCALE=demo bash recipes/s3_onpolicy.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Its 0 % rows are Table 1's Best/Low (mean chosen -0.93) and Medium/Worst (-4.18): s3_tiers.sh makes them and the answers,
# or has made them. Not as in the paper: Algorithm 1 makes the new answer the chosen one where it is better, section 5.3
# always the rejected one; here both, with the paper's numbers next to the first (the second makes pairs whose rejected
# answer is the better one; in the lower base most are). Wrong in the paper: its 0 % row of -4.18 repeats Low/Worst (LC
# 25.8); Medium/Worst has 26.7. 30 trainings, 6 of them of s3_tiers.sh, on a node of 8 x 80 GB; not run there.
# Demo: the best of four, only Algorithm 1, one epoch of two, greedy answers (beams are slow on two cores).
source "$(dirname "$0")/settings.sh" || exit
setting MODEL allenai/Llama-3.1-Tulu-3-8B-SFT out/models/policy
setting DATA ultrafeedback demo
setting TIERS "out/s3_tiers/$DATA" # OUT of s3_tiers.sh
setting K 8 4
default RULES "algorithm1 rejected" algorithm1
s3_settings
default OUT "out/s3_onpolicy/${MODEL##*/}"
needs "$MODEL" "$REWARD"

MODEL=$MODEL DATA=$DATA OUT=$TIERS SETS="best_low medium_worst" bash recipes/s3_tiers.sh
on_gpus "$OUT/samples" generate.py --preset s3 --n "$K" --model "$MODEL" --prompts "$TIERS/answers/prompts.jsonl"
on_gpus "$OUT/on" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT"/samples/*.jsonl

for base in best_low medium_worst; do
  for share in 0.1 0.2; do
    for rule in $RULES; do
      name=${base}_${share}_$rule
      python "$PAIRS_SCRIPT" --scored "$TIERS"/scored/*.jsonl "$OUT"/on/*.jsonl --tiers "${base/_//}" $PAIRS \
        --replace "$share" --replace-rule "$rule" --inverted keep --out "$OUT/$name.pairs.jsonl"
      train_s3 "$name"
    done
  done
done
python report/table.py "$TIERS"/{best_low,medium_worst}[._]*.json "$TIERS"/{best_low,medium_worst}_seed*/metrics.* \
  "$OUT"/*.json "$OUT"/*/metrics.* --paper recipes/paper/s3_onpolicy.csv --out "$OUT"
