#!/usr/bin/env bash
# Two iterations in all orders of off- and on-policy pairs, and the boundary score before each (S2 Tables 1 and 3).
source "$(dirname "$0")/../settings.sh"
for seed in $SEEDS; do
  SEED=$seed OUT=$RUNS/seed$seed bash recipes/s2_stages.sh
  mkdir -p "$KEPT/seed$seed"
  cp "$RUNS/seed$seed"/{*.winrate.json,*.boundary.json,*.pairs.meta.json,report.md,*.csv,fig3.png} "$KEPT/seed$seed"
done
verify "$RUNS"/seed{0,1,2}/{off,on,off-off,off-on,on-off,on-on}
compare on_against_off "$RUNS"/seed{0,1,2}/on --second "$RUNS"/seed{0,1,2}/off
compare after_off_on_against_off "$RUNS"/seed{0,1,2}/off-on --second "$RUNS"/seed{0,1,2}/off-off
compare after_on_on_against_off "$RUNS"/seed{0,1,2}/on-on --second "$RUNS"/seed{0,1,2}/on-off
compare off_on_against_on_off "$RUNS"/seed{0,1,2}/off-on --second "$RUNS"/seed{0,1,2}/on-off
compare off_against_start "$RUNS"/seed{0,1,2}/off
compare on_against_start "$RUNS"/seed{0,1,2}/on
