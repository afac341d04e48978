#!/usr/bin/env bash
# S3 Table 3: a large or small gap between chosen and rejected, and chosen ones of high or low reward, from the four answers
# of UltraFeedback.
#
#     SCALE=demo bash recipes/s3_gaps.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: its rule is unpublished. Here ranks of the four answers, with means like the paper's: 1 over 3 and 2
# over 4 with a gap of 1.5 or more, 1 over 2, 3 over 4, each set on all prompts that have such a pair (the paper: on the
# 41,633 that Tulu's version has too). LG-HQ-inv, rank 1 over 2, is then SG-HQ on the prompts of LG-HQ. Pairs that a swap
# inverts are dropped; the paper kept some. 18 trainings on a node of 8 x 80 GB; not run there.
# Demo: ranks among two written answers and four of the policy, a gap of 1 or more, one epoch of two, greedy answers (beams
# are slow on two cores).
source "$(dirname "$0")/settings.sh" || exit
setting MODEL allenai/Llama-3.1-Tulu-3-8B-SFT out/models/policy
default OUT "out/s3_gaps/${MODEL##*/}"
mixture='import datasets, sys; datasets.load_dataset("allenai/tulu-3-sft-mixture")["train"].to_json(sys.stdout.buffer)'
setting SEEN "" data/eval.jsonl # what MODEL was trained on, whose prompts are left out; "": mixture, by pip install datasets
setting DATA "--format ultrafeedback --data openbmb/UltraFeedback $limit" "$OFF_POLICY"
default SETS "lg_hq lg_lq sg_hq sg_lq lg_hq_inv sg_hq_inv"
setting GAP 1.5 1
s3_settings
needs "$MODEL" "$REWARD"

python data/import_responses.py $DATA --out "$OUT/off.jsonl"
if [ "$SEEN" ]; then cat "$SEEN"; else python -c "$mixture"; fi >"$OUT/seen.jsonl"
python data/decontaminate.py --prompts "$OUT/off.jsonl" --seen "$OUT/seen.jsonl" --out "$OUT/clean.jsonl"
answers=("$OUT/clean.jsonl")
if [ "$SCALE" = demo ]; then
  on_gpus "$OUT/more" generate.py --source off --n 4 --temperature 1 --top-p 1 --model "$MODEL" --prompts "$OUT/clean.jsonl"
  answers+=("$OUT"/more/*.jsonl)
fi
on_gpus "$OUT/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "${answers[@]}"

pairs=("$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl)
python "${pairs[@]}" --ranks 1 2 --out "$OUT/swap/1_2.pairs.jsonl" # the inverse sets take their rejected answers
python "${pairs[@]}" --ranks 3 4 --out "$OUT/swap/3_4.pairs.jsonl"
python "${pairs[@]}" --ranks 1 3 --gap "$GAP" $PAIRS --out "$OUT/lg_hq.pairs.jsonl"
python "${pairs[@]}" --ranks 2 4 --gap "$GAP" $PAIRS --out "$OUT/lg_lq.pairs.jsonl"
python "${pairs[@]}" --ranks 1 2 $PAIRS --out "$OUT/sg_hq.pairs.jsonl"
python "${pairs[@]}" --ranks 3 4 $PAIRS --out "$OUT/sg_lq.pairs.jsonl"
python "${pairs[@]}" --ranks 1 3 --gap "$GAP" $PAIRS --swap-rejected "$OUT/swap/1_2.pairs.jsonl" \
  --out "$OUT/lg_hq_inv.pairs.jsonl"
python "${pairs[@]}" --ranks 1 2 $PAIRS --swap-rejected "$OUT/swap/3_4.pairs.jsonl" --out "$OUT/sg_hq_inv.pairs.jsonl"

train_s3 $SETS
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* --paper recipes/paper/s3_gaps.csv --out "$OUT"
