#!/usr/bin/env bash
# S1 Table 2: five sources of equally many pairs, two models, two data sets. By task Tables 4, 5; by category Figs. 2, 8.
#
#     SCALE=demo bash recipes/s1_table2.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: shares are exact and no prompt comes twice (its code interleaves with repetition), all pairs have
# labels of the reward model (in its code off-policy ones have GPT-4's), HyPO's formula is corrected and its lambda ours.
# DPO-Mix-P mixes the policy with the reference, which are the same model before any training. So it goes in two rounds:
# half of its pairs are plain samples; the mixtures, on other prompts, give the rest. (Its online form draws a plain pair
# with probability 0.3; here their share is a half.) 24 trainings on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
default MODELS "${MODEL:-meta-llama/Llama-3.1-8B-Instruct allenai/Llama-3.1-Tulu-3-8B-SFT}" "${MODEL:-out/models/policy}"
default DATA "ultrafeedback helpsteer2" demo # ultrafeedback, like demo, is OFF_POLICY
setting PAIRS "" # the number of pairs is that of the data set, or N_PAIRS
setting HYPO "--method hypo" "--method hypo --max-new 48"
default LABELER gpt-4o-mini # names the category of each of AlpacaEval's prompts
default PAPER recipes/paper/s1_table2.csv ""
default OUT "out/s1_table2/$SCALE"
needs $MODELS "$REWARD"

for MODEL in $MODELS; do
  for data in $DATA; do
    run=$OUT/${MODEL##*/}_$data baseline=$OUT/${MODEL##*/}_start # the settings are ${run}_off, ...
    case $data in
      ultrafeedback | demo) off=$OFF_POLICY total=${N_PAIRS:-50000} ;;
      helpsteer2) off="--format helpsteer2 --data nvidia/HelpSteer2 $limit" total=${N_PAIRS:-9000} ;;
      *) stop "DATA must name ultrafeedback, helpsteer2 or both, found $data" ;;
    esac
    python data/import_responses.py $off --out "$run/off.jsonl"
    on_gpus "$run/on" generate.py --model "$MODEL" --prompts "$run/off.jsonl"
    on_gpus "$run/scored" "$SCORE_SCRIPT" --model "$REWARD" --responses "$run"/on/*.jsonl "$run/off.jsonl"
    pairs=("$PAIRS_SCRIPT" --scored "$run"/scored/*.jsonl)
    python "${pairs[@]}" --on-ratio 0 --total "$total" $PAIRS --out "${run}_off.pairs.jsonl"
    python "${pairs[@]}" --on-ratio 1 --total "$total" $PAIRS --out "${run}_on.pairs.jsonl"
    python "${pairs[@]}" --on-ratio 0.5 --total "$total" $PAIRS --out "${run}_simplemix.pairs.jsonl"
    for name in "${run}"_{off,on,simplemix}; do
      train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$name.pairs.jsonl" --out "$name"
    done
    train recipes/train_online.py $HYPO --model "$MODEL" --pairs "${run}_off.pairs.jsonl" --out "${run}_hypo"

    first=${run}_mixp_round1
    python "${pairs[@]}" --on-ratio 1 --total $((total / 2)) $PAIRS --out "$first.pairs.jsonl"
    train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$first.pairs.jsonl" --out "$first"
    python data/decontaminate.py --prompts "$run/off.jsonl" --seen "$first.pairs.jsonl" --out "$run/other_prompts.jsonl"
    mixture=(recipes/sample_mixture.py --model "$first" --reference "$MODEL" --prompts "$run/other_prompts.jsonl")
    on_gpus "$run/mixture_1" "${mixture[@]}" --weights 1.5 -0.5
    on_gpus "$run/mixture_2" "${mixture[@]}" --weights 0.5 0.5
    on_gpus "$run/mixed" "$SCORE_SCRIPT" --model "$REWARD" --responses "$run"/mixture_?/*.jsonl
    python "$PAIRS_SCRIPT" --scored "$run"/mixed/*.jsonl --on-ratio 1 --total $((total / 2)) $PAIRS \
      --out "${run}_mixp.pairs.jsonl"
    train "$TRAIN_SCRIPT" --model "$first" --reference "$MODEL" --pairs "${run}_mixp.pairs.jsonl" --out "${run}_mixp"

    for name in "${run}"_{off,on,hypo,mixp,simplemix}; do win_rate "$name" "$name"; done
    for name in "${run}"_{off,on,hypo,mixp,simplemix}; do benchmarks "$name" "$name" simplemix; done
    python report/figure.py categories "${run}"_{off,on,simplemix}.winrate.json --out "${run}_categories.png"
  done
  win_rate "$MODEL" "$OUT/${MODEL##*/}"
  benchmarks "$MODEL" "$OUT/${MODEL##*/}" simplemix
done
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* ${PAPER:+--paper "$PAPER"} --out "$OUT"
