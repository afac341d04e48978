#!/usr/bin/env bash
# Rounds, ours: S2's conclusion leaves "smoother and more adaptive data blending" open. In each round the score of the
# current model becomes the share of on-policy pairs: the more it beats the off-policy answers, the more it learns from
# its own.
#
#     SCALE=demo bash recipes/rounds.sh     (SHARE=0.5 for a fixed share; recipes/settings.sh tells what SCALE does)
#
# The judge (demo: the reward) also compares each model with that of the round before. 3 trainings on 8 x 80 GB; not run.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
setting SHARE boundary
default ROUNDS 3 2
default OUT "out/rounds/${MODEL##*/}_$SHARE"
needs "$MODEL" "$REWARD"

python data/import_responses.py $OFF_POLICY --out "$OUT/off.jsonl"
win_rate "$MODEL" "$OUT/start"
model=$MODEL before=$OUT/start
for round in $(seq "$ROUNDS"); do
  run=$OUT/round_$round
  on_gpus "$run.on" generate.py --seed "$round" --model "$model" --prompts "$OUT/off.jsonl"
  on_gpus "$run.scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$run".on/*.jsonl "$OUT/off.jsonl"
  python boundary.py --scored "$run".scored/*.jsonl --out "$run.boundary.json" # of the model that the round begins with
  share=$SHARE
  if [ "$share" = boundary ]; then
    share=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["score"])' "$run.boundary.json")
  fi
  python "$PAIRS_SCRIPT" --scored "$run".scored/*.jsonl --on-ratio "$share" --seed "$round" $PAIRS \
    --out "$run.pairs.jsonl"
  train "$TRAIN_SCRIPT" --seed "$round" --model "$model" --pairs "$run.pairs.jsonl" --out "$run"
  win_rate "$run" "$run"

  answers=("$before".answers/*.jsonl "$run".answers/*.jsonl)
  if [ "$SCALE" = demo ]; then
    python "$SCORE_SCRIPT" --model "$REWARD" --responses "${answers[@]}" --out "$run.compared.jsonl"
  else
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline "$model" \
      --responses "${answers[@]}" --out "$run.compared.jsonl"
  fi
  python evaluate.py --scored "$run.compared.jsonl" --model "$run" --baseline "$model" \
    --out "$OUT/before/round_$round.winrate.json"
  model=$run before=$run
done
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.boundary.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"

python - "$OUT" "$ROUNDS" <<'END' | tee "$OUT/rounds.md"
import json, sys
from pathlib import Path
out, rounds = Path(sys.argv[1]), int(sys.argv[2])
print("| round | boundary score | on-policy share | win rate | win rate against the round before |\n|---|---|---|---|---|")
for k in range(1, rounds + 1):
    score = json.loads((out / f"round_{k}.boundary.json").read_text())["score"]
    counts = json.loads((out / f"round_{k}.pairs.meta.json").read_text())["counts"]
    line = f"| {k} | {score:.3f} | {counts['on'] / counts['pairs']:.2f} |"
    for folder in (out, out / "before"):
        rate = json.loads((folder / f"round_{k}.winrate.json").read_text())
        line += f" {rate['win_rate']:.1f} ({rate['ci'][0]:.1f} to {rate['ci'][1]:.1f}) |"
    print(line)
END
