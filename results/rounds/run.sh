#!/usr/bin/env bash
# Two rounds, each on the model's own samples: the share set by the boundary score against a fixed half; one seed.
source "$(dirname "$0")/../settings.sh"
for share in boundary 0.5; do
  SHARE=$share OUT=$RUNS/$share bash recipes/rounds.sh
  mkdir -p "$KEPT/$share"
  cp "$RUNS/$share"/{*.winrate.json,*.boundary.json,*.pairs.meta.json,report.md,*.csv,rounds.md} "$KEPT/$share"
  verify "$RUNS/$share"/round_{1,2}
  mkdir -p "$RUNS/all"
  for round in 1 2; do
    cp "$RUNS/$share/round_$round.winrate.json" "$RUNS/all/${share}_round_$round.winrate.json"
  done
done
python report/figure.py settings "$RUNS"/all/*.winrate.json --out "$RUNS/all/rates.png"
cp "$RUNS/all/rates.png" "$KEPT"
compare boundary_against_half "$RUNS/boundary/round_2" --second "$RUNS/0.5/round_2"
compare boundary_round_2_against_1 "$RUNS/boundary/round_2" --second "$RUNS/boundary/round_1"
compare half_round_2_against_1 "$RUNS/0.5/round_2" --second "$RUNS/0.5/round_1"
compare boundary_against_start "$RUNS/boundary/round_2"
