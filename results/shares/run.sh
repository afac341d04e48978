#!/usr/bin/env bash
# The on-policy share (S1 Fig. 4), by kind of prompt (S1 Fig. 2), and the share set by category (ours).
source "$(dirname "$0")/../settings.sh"
FIG4=$RUNS/fig4 OUT=$RUNS/by_category bash recipes/category_shares.sh
python report/figure.py categories "$RUNS"/fig4/dpo_{0,0.5,1}_seed*.winrate.json --out "$RUNS/fig4/categories.png"
keep "$RUNS/fig4"
cp "$RUNS"/by_category/{*.winrate.json,report.md,settings.csv} "$KEPT"

on=("$RUNS"/fig4/dpo_1_seed{0,1,2}) off=("$RUNS"/fig4/dpo_0_seed{0,1,2}) half=("$RUNS"/fig4/dpo_0.5_seed{0,1,2})
quarter=("$RUNS"/fig4/dpo_0.25_seed{0,1,2}) most=("$RUNS"/fig4/dpo_0.75_seed{0,1,2})
by_category=("$RUNS"/by_category/by_category_seed{0,1,2})
verify "${on[@]}" "${off[@]}" "${half[@]}" "${quarter[@]}" "${most[@]}" "${by_category[@]}"
compare on_against_start "${on[@]}"
compare off_against_start "${off[@]}"
compare on_against_off "${on[@]}" --second "${off[@]}"
compare half_against_off "${half[@]}" --second "${off[@]}"
compare half_against_on "${half[@]}" --second "${on[@]}"
compare most_against_half "${most[@]}" --second "${half[@]}"
compare quarter_against_half "${quarter[@]}" --second "${half[@]}"
compare by_category_against_half "${by_category[@]}" --second "${half[@]}"
compare by_category_against_most "${by_category[@]}" --second "${most[@]}"
compare by_category_against_on "${by_category[@]}" --second "${on[@]}"
