#!/usr/bin/env bash
# Two iterations in all orders of off- and on-policy pairs, and the boundary score before each (S2 Tables 1 and 3).
source "$(dirname "$0")/../settings.sh"
for seed in $SEEDS; do
  SEED=$seed OUT=$RUNS/seed$seed bash recipes/s2_stages.sh
  mkdir -p "$KEPT/seed$seed" "$RUNS/all"
  cp "$RUNS/seed$seed"/{*.winrate.json,*.boundary.json,*.pairs.meta.json,fig3.png} "$KEPT/seed$seed"
  for file in "$RUNS/seed$seed"/*.{winrate,boundary}.json; do
    name=$(basename "$file")
    cp "$file" "$RUNS/all/${name/./_seed$seed.}" # off_seed0.winrate.json
  done
done
python report/figure.py settings "$RUNS"/all/*.winrate.json --out "$RUNS/all/rates.png"
cp "$RUNS/all/rates.png" "$KEPT"
python report/table.py "$RUNS"/all/*.json --start policy --delta policy off on --delta off off-off off-on \
  --delta on on-off on-on --out "$KEPT"
verify "$RUNS"/seed{0,1,2}/{off,on,off-off,off-on,on-off,on-on}
compare on_against_off "$RUNS"/seed{0,1,2}/on --second "$RUNS"/seed{0,1,2}/off
compare after_off_on_against_off "$RUNS"/seed{0,1,2}/off-on --second "$RUNS"/seed{0,1,2}/off-off
compare after_on_on_against_off "$RUNS"/seed{0,1,2}/on-on --second "$RUNS"/seed{0,1,2}/on-off
compare off_on_against_on_off "$RUNS"/seed{0,1,2}/off-on --second "$RUNS"/seed{0,1,2}/on-off
compare off_against_start "$RUNS"/seed{0,1,2}/off
compare on_against_start "$RUNS"/seed{0,1,2}/on
