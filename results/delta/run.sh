#!/usr/bin/env bash
# Must preference data be on-policy, or does only the difference between the two answers count? Two gaps by three shares.
source "$(dirname "$0")/../settings.sh"
SEEDS="0 1" OUT=$RUNS bash recipes/delta.sh
keep "$RUNS"
on=("$RUNS"/{small,large}_gap_1_seed{0,1}) off=("$RUNS"/{small,large}_gap_0_seed{0,1})
large=("$RUNS"/large_gap_{0,0.5,1}_seed{0,1}) small=("$RUNS"/small_gap_{0,0.5,1}_seed{0,1})
verify "${large[@]}" "${small[@]}"
compare on_against_off "${on[@]}" --second "${off[@]}"
compare large_against_small "${large[@]}" --second "${small[@]}"
compare off_large_against_on_small "$RUNS"/large_gap_0_seed{0,1} --second "$RUNS"/small_gap_1_seed{0,1}
compare off_large_against_start "$RUNS"/large_gap_0_seed{0,1}
