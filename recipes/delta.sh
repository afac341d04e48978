#!/usr/bin/env bash
# Delta, ours: must preference data be on-policy (Tulu 3), or does only the difference between the two answers count (delta
# learning, Olmo 3)? A grid of two gaps and three on-policy shares. Of four answers per source, by one reward, the best is
# chosen in every cell, and the second (small gap) or the last (large gap) is rejected. All cells have the same prompts,
# those with three different answers per source, and equally many pairs.
#
#     SCALE=demo bash recipes/delta.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# 18 trainings on a node of 8 x 80 GB; not run there. Demo: the four off-policy answers are the two written ones and two
# of the policy at temperature 1, so they are not all of others.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL allenai/Llama-3.1-Tulu-3-8B-SFT out/models/policy
default OUT "out/delta/${MODEL##*/}"
setting DATA "--format ultrafeedback --data openbmb/UltraFeedback $limit" "$OFF_POLICY"
setting SEEDS "0 1 2" 0
needs "$MODEL" "$REWARD"

python data/import_responses.py $DATA --out "$OUT/off.jsonl"
answers=("$OUT/off.jsonl")
if [ "$SCALE" = demo ]; then
  on_gpus "$OUT/more" generate.py --source off --n 2 --temperature 1 --top-p 1 --seed 1 --model "$MODEL" \
    --prompts "$OUT/off.jsonl"
  answers+=("$OUT"/more/*.jsonl)
fi
on_gpus "$OUT/on" generate.py --n 4 --model "$MODEL" --prompts "$OUT/off.jsonl"
on_gpus "$OUT/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT"/on/*.jsonl "${answers[@]}"
for gap in small large; do
  python - $gap "$OUT"/scored/*.jsonl >"$OUT/$gap.jsonl" <<'END'
import json, sys

for path in sys.argv[2:]:
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        kept = []
        for source in ("on", "off"):
            answers = [r for r in row["responses"] if r["source"] == source and r["finish"] != "length"]
            answers = {r["reward"]: r for r in answers if r["reward"] is not None}  # equal texts have equal rewards
            ranked = [answers[reward] for reward in sorted(answers, reverse=True)]
            if len(ranked) >= 3:  # the second is not the last
                kept += [ranked[0], ranked[1 if sys.argv[1] == "small" else -1]]
        if len(kept) == 4:
            print(json.dumps(row | {"responses": kept}, ensure_ascii=False))
END
done

for seed in $SEEDS; do
  for share in 0 0.5 1; do
    for gap in small large; do
      run=$OUT/${gap}_gap_${share}_seed$seed
      python "$PAIRS_SCRIPT" --scored "$OUT/$gap.jsonl" --on-ratio "$share" --seed "$seed" $PAIRS \
        --out "$run.pairs.jsonl"
      train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$run.pairs.jsonl" --seed "$seed" --out "$run"
      win_rate "$run" "$run"
    done
  done
done
python report/figure.py ratio "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json --out "$OUT/delta.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
