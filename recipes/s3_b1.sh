#!/usr/bin/env bash
# S3 Appendix B.1: prompts of Tulu's UltraFeedback whose two answers a reward model and a judge order differently, trained
# on in the order of either.
#
#     SCALE=demo bash recipes/s3_b1.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: it names neither judge nor its prompt (here our own) and prints no results (10,000 prompts differed,
# and the reward model's order did better). The benchmarks' questions are left out. Some answers are of Tulu-3-8B, which is
# not marked. 6 trainings on a node of 8 x 80 GB and some 40,000 questions to the judge; not run there.
# Demo: the judge is who wrote the two answers, one as the better; one epoch of two, greedy answers (beams are slow).
source "$(dirname "$0")/settings.sh" || exit
setting MODEL allenai/Llama-3.1-Tulu-3-8B-SFT out/models/policy
setting PAIR_JUDGE gpt-4o-mini # orders the two answers of a prompt; JUDGE is AlpacaEval's
default OUT "out/s3_b1/${MODEL##*/}"
setting DATA "--format ultrafeedback_binarized --data allenai/tulu-3-ultrafeedback-cleaned-on-policy-8b --split train $limit" \
  "--format rows --data $OUT/written.jsonl $limit"
s3_settings
needs "$MODEL" "$REWARD"

mkdir -p "$OUT"
if [ "$SCALE" = demo ]; then
  cp data/eval.jsonl "$OUT/questions.jsonl"
  sed 's/"written-careful"/&, "scores": {"judge": 1}/; s/"written-hasty"/&, "scores": {"judge": 0}/' \
    data/train.jsonl >"$OUT/written.jsonl"
else
  python - "$ALPACA/alpaca_eval_gpt4_baseline.json" >"$OUT/questions.jsonl" <<'END' # pip install datasets
import datasets, json, sys

questions = [row["instruction"] for row in json.load(open(sys.argv[1]))]
questions += datasets.load_dataset("google/IFEval", split="train")["prompt"]
questions += datasets.load_dataset("openai/gsm8k", "main", split="test")["question"]
questions += datasets.load_dataset("truthfulqa/truthful_qa", "generation", split="validation")["question"]
questions += datasets.load_dataset("cais/mmlu", "all", split="test")["question"]
for question in questions:
    print(json.dumps({"question": question}))
END
fi
python data/import_responses.py $DATA --out "$OUT/off.jsonl"
python data/decontaminate.py --prompts "$OUT/off.jsonl" --seen "$OUT/questions.jsonl" --out "$OUT/clean.jsonl"
on_gpus "$OUT/rewards" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT/clean.jsonl"
both=("$OUT"/rewards/*.jsonl)
if [ "$SCALE" = paper ]; then
  python scorers/judge.py --model "$PAIR_JUDGE" --responses "${both[@]}" --out "$OUT/both.jsonl"
  both=("$OUT/both.jsonl")
fi
pairs=("$PAIRS_SCRIPT" --scored "${both[@]}" --ranks 1 2)
python "${pairs[@]}" --reward rm --disagree judge $PAIRS --out "$OUT/reward.pairs.jsonl" # prints how often they agree
python "${pairs[@]}" --reward judge --disagree rm $PAIRS --out "$OUT/judge.pairs.jsonl"

train_s3 reward judge
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* --out "$OUT"
