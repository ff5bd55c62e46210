#!/usr/bin/env bash
# Reproduce the results in the README: runs/reproduce.sh ALGO [ENV...]
# Every environment is a step of its own: skipped if its results are kept, resumed if it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

algo=${1:-}
shift || true
case $algo in
    ppo)
        envs=(CartPole-v1 Acrobot-v1 HalfCheetah-v4 Hopper-v4 Walker2d-v4 InvertedPendulum-v4)
        flags=(--semantics cleanrl)  # budgets and hyper-parameters are CleanRL's by default
        seeds() { [[ $1 == Acrobot-v1 ]] && echo 20 || echo 10; }  # the number its margin takes, docs/curves.md
        ;;
    dqn)
        envs=(CartPole-v1 Acrobot-v1)
        flags=()
        seeds() { echo 10; }
        ;;
    c51)
        envs=(CartPole-v1)
        flags=()
        seeds() { echo 10; }
        ;;
    sac)
        envs=(HalfCheetah-v4 Hopper-v4)
        flags=(--total-timesteps 300000)  # of CleanRL's million: hours on one core, and informative by then
        seeds() { echo 3; }
        ;;
    *)
        echo "usage: runs/reproduce.sh ppo|dqn|c51|sac [ENV...]" >&2
        exit 2
        ;;
esac
(($# == 0)) || envs=("$@")
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

run_folders() { compgen -G "runs/$algo/${env}__${algo}__*"; }
finished() { for folder; do [[ -f $folder/model.safetensors ]] || return; done; }

for env in "${envs[@]}"; do
    echo "=== $algo on $env"
    if compgen -G "runs/results/$algo/*__$env.csv.gz" > /dev/null; then
        echo "its results are kept; remove runs/results/$algo/*__$env.* to train again"
        continue
    fi
    mapfile -t folders < <(run_folders)
    if ((${#folders[@]} == 0)); then
        "$python" -m "rl_lab.$algo" --env "$env" "${flags[@]}" --num-seeds "$(seeds "$env")" --runs-dir "runs/$algo"
        mapfile -t folders < <(run_folders)
    elif ! finished "${folders[@]}"; then
        "$python" -m "rl_lab.$algo" --resume "${folders[0]}"
    fi
    # 0 to 3 are verdicts, and a verdict is a finding; anything else is a fault.
    "$python" -m rl_lab.compare "${folders[@]}" --report "runs/$algo/$env.html" || (($? <= 3))
    "$python" -m rl_lab.curves.summary "$algo" "${folders[@]}"
done
