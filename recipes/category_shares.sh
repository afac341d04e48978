#!/usr/bin/env bash
# The share set by category, ours, after S1 Fig. 2: on-policy pairs where answers are right or wrong, off-policy pairs where
# taste decides, against one share for all prompts (S1 Fig. 4). All pairs are of the same rewards and prompts, and equally
# many: with one seed and total build_pairs.py takes the same prompts at every share.
#
#     SCALE=demo bash recipes/category_shares.sh     (recipes/settings.sh tells what SCALE and the functions do)
#
# Runs s1_fig4.sh first, whose trainings it shows next to its own. 30 trainings on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
setting FIG4 "out/s1_fig4/${MODEL##*/}" # OUT of s1_fig4.sh
default OUT "out/category_shares/${MODEL##*/}"
setting SEEDS "0 1 2" 0
default LABELER gpt-4o-mini; export LABELER # names the categories of the prompts
needs "$MODEL" "$REWARD"

MODEL=$MODEL OUT=$FIG4 bash recipes/s1_fig4.sh
if [ "$SCALE" = demo ]; then
  mkdir -p "$OUT"
  cat "$FIG4"/scored/*.jsonl >"$OUT/scored.jsonl" # its prompts have categories
  taste=(writing recommendation)
else
  python scorers/category.py --model "$LABELER" --responses "$FIG4"/scored/*.jsonl --out "$OUT/scored.jsonl"
  taste=("assisting or creative writing" roleplay recommendation)
fi
for seed in $SEEDS; do
  run=$OUT/by_category_seed$seed
  pairs=("$PAIRS_SCRIPT" --scored "$OUT/scored.jsonl" --seed "$seed")
  python "${pairs[@]}" --on-ratio 1 $PAIRS --out "$run.parts/on.pairs.jsonl"
  python "${pairs[@]}" --on-ratio 0 $PAIRS --out "$run.parts/off.pairs.jsonl"
  python - "$run.parts" "${taste[@]}" >"$run.pairs.jsonl" <<'END'
import json, sys

folder, *taste = sys.argv[1:]
for source in ("on", "off"):
    for line in open(f"{folder}/{source}.pairs.jsonl", encoding="utf-8"):
        if (json.loads(line).get("category") in taste) == (source == "off"):
            print(line, end="")
END
  train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$run.pairs.jsonl" --seed "$seed" --out "$run"
  win_rate "$run" "$run"
done
python report/table.py "$FIG4"/*.winrate.json "$FIG4"/*.pairs.meta.json "$FIG4"/*/metrics.* \
  "$OUT"/*.winrate.json "$OUT"/*/metrics.* --out "$OUT"
