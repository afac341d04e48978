#!/usr/bin/env bash
# Quality of the chosen answer against the gap between the two: four sets of equal size (S3 Tables 1 and 3).
source "$(dirname "$0")/../settings.sh"
SETS="lg_hq lg_lq sg_hq sg_lq" OUT=$RUNS bash recipes/s3_gaps.sh
python report/figure.py settings "$RUNS"/*.winrate.json --out "$RUNS/rates.png"
keep "$RUNS"
large_high=("$RUNS"/lg_hq_seed{0,1,2}) large_low=("$RUNS"/lg_lq_seed{0,1,2})
small_high=("$RUNS"/sg_hq_seed{0,1,2}) small_low=("$RUNS"/sg_lq_seed{0,1,2})
verify "${large_high[@]}" "${large_low[@]}" "${small_high[@]}" "${small_low[@]}"
compare high_against_low "${large_high[@]}" "${small_high[@]}" --second "${large_low[@]}" "${small_low[@]}"
compare large_against_small "${large_high[@]}" --second "${small_high[@]}" # the best answer is chosen in both
compare quality_against_gap "${small_high[@]}" --second "${large_low[@]}"
