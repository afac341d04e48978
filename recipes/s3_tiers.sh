#!/usr/bin/env bash
# S3 Tables 1, 2 and 5: chosen and rejected from five tiers of the same answers; SFT and online DPO on the best ones.
#
#     SCALE=demo bash recipes/s3_tiers.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: its rule for the tiers is unpublished and lets them overlap (here ranks, without prompts of equal
# tiers); the Mistral models are our guess, and so is online DPO's sampling (temperature 1). Tulu's version of UltraFeedback
# has no TruthfulQA and, not marked, answers of Tulu-3-8B: "off-policy" is partly on-policy. The paper's mean gap is the
# difference of Table 5's means. 27 trainings for a data set on a node of 8 x 80 GB; not run there. Demo: two written
# answers and five of the policy, three of the seven sets, one epoch of two, greedy answers (beams are slow on two cores).
source "$(dirname "$0")/settings.sh" || exit
setting MODEL allenai/Llama-3.1-Tulu-3-8B-SFT out/models/policy
setting DATA ultrafeedback demo # and oasst2
mixture='import datasets, sys; datasets.load_dataset("allenai/tulu-3-sft-mixture")["train"].to_json(sys.stdout.buffer)'
setting SEEN "" data/eval.jsonl # what MODEL was trained on, whose prompts are left out; "": mixture, by pip install datasets
setting OTHERS "mistralai/Mistral-7B-Instruct-v0.2 princeton-nlp/Mistral-7B-Instruct-SimPO" "$MODEL"
setting OTHER "--n 1" "--n 5 --temperature 1" # how they are sampled
setting SFT "--loss sft --lr 1e-6 --adam-beta2 0.95" "--loss sft --adam-beta2 0.95" # S3 B.3
setting ONLINE "--method online-dpo --max-new 1024" "--method online-dpo --max-new 48"
s3_settings
all_sets="best_worst best_low best_medium best_high low_worst medium_worst high_worst"
default SETS "$all_sets sft online" "best_worst best_high low_worst sft online"
default PAPER "recipes/paper/s3_tiers_${DATA/demo/ultrafeedback}.csv"
default OUT "out/s3_tiers/$DATA"
needs "$MODEL" "$REWARD" $OTHERS
case $DATA in
  ultrafeedback) # only prompts of both its versions get five answers
    python data/import_responses.py --format ultrafeedback --data openbmb/UltraFeedback --out "$OUT/answers/original.jsonl"
    data="--format ultrafeedback_binarized --data allenai/tulu-3-ultrafeedback-cleaned-on-policy-8b --split train $limit" ;;
  oasst2) data="--format oasst2 --data OpenAssistant/oasst2 $limit" ;;
  demo) data=$OFF_POLICY ;;
  *) stop "DATA must be ultrafeedback or oasst2, found $DATA" ;;
esac
python data/import_responses.py $data --out "$OUT/prompts.jsonl"
if [ "$SEEN" ]; then cat "$SEEN"; else python -c "$mixture"; fi >"$OUT/seen.jsonl"
python data/decontaminate.py --prompts "$OUT/prompts.jsonl" --seen "$OUT/seen.jsonl" --out "$OUT/answers/prompts.jsonl"
i=0
for model in $OTHERS; do # with one seed for all, their answers would begin alike
  on_gpus "$OUT/answers/${model##*/}" generate.py --preset s3 $OTHER --source off --seed $((i += 1)) --model "$model" \
    --prompts "$OUT/answers/prompts.jsonl"
done
on_gpus "$OUT/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT"/answers/*.jsonl "$OUT"/answers/*/*.jsonl
pairs=("$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl)
for name in $all_sets; do python "${pairs[@]}" --tiers "${name/_//}" $PAIRS --out "$OUT/$name.pairs.jsonl"; done

for seed in $SEEDS; do
  if [ "$SCALE" = paper ]; then answer_seed=$seed; fi # of beams; greedy answers have none
  win_rate "$MODEL" "$OUT/${MODEL##*/}_seed$seed"
  for name in $SETS; do
    run=$OUT/${name}_seed$seed
    script=$TRAIN_SCRIPT method="" from=$name
    if [ "$name" = sft ]; then method=$SFT from=best_worst; fi
    if [ "$name" = online ]; then script=recipes/train_online.py method=$ONLINE from=best_worst; fi
    train "$script" $method --pairs "$OUT/$from.pairs.jsonl" $S3 --seed "$seed" --model "$MODEL" --out "$run"
    win_rate "$run" "$run"
    benchmarks "$run" "$run" what-matters
  done
done
benchmarks "$MODEL" "$OUT/${MODEL##*/}" what-matters
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* --paper "$PAPER" --out "$OUT"
