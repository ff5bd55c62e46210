#!/usr/bin/env bash
# Reproduce docs/overoptimization.md: what optimizing a learned reward does to the reward it was learned from.
#   POLARITY    the folder of Pang and Lee's rt-polarity.pos and rt-polarity.neg, seen from the clone
# A run that was interrupted is resumed, one that is finished is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

export POLARITY=${POLARITY:?names the folder of rt-polarity.pos and rt-polarity.neg}
model=smollm2-135m folder=runs/overoptimization
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
study=("$python" -m rl_lab.overoptimization)
source runs/train_language.sh

"$python" -m rl_lab.models "$model"
[[ -f $folder/pairs.jsonl ]] || "${study[@]}" pairs "$folder" --model "$model"
train "$folder" reward_model 1 --data "$folder/pairs.jsonl" --lora-rank 16 --learning-rate 1e-3 --warmup 5 --batch-size 16 --steps 68
proxy=$run
[[ -f $folder/best_of_n.json ]] || "${study[@]}" best-of-n "$folder" --model "$model" --proxy "$proxy"
train "$folder" grpo 1 --prompts "$folder/prompts.jsonl" --reward "$proxy" rl_lab.overoptimization:gold --reward-weights 1 0 \
    --beta 1e-3 --max-new-tokens 16 --prompts-per-step 4 --group-size 8 --steps 60 --learning-rate 2e-5 --no-decay
"${study[@]}" report "$folder" --proxy "$proxy" --policy "$run"
mkdir -p runs/results/overoptimization
cp "$folder/report.json" "$folder/overoptimization.png" runs/results/overoptimization
