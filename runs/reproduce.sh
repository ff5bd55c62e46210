#!/usr/bin/env bash
# Reproduce the results in the README: runs/reproduce.sh ALGO [ENV...]
# Every environment is a step of its own: skipped if its results are kept, resumed if it was interrupted.
# Atari games are trained with the schedules of 10 million steps up to ATARI_STOP (0 for the end), hours on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

algo=${1:-}
shift || true
case $algo in
    ppo)
        envs=(CartPole-v1 Acrobot-v1 HalfCheetah-v4 Hopper-v4 Walker2d-v4 InvertedPendulum-v4
              BreakoutNoFrameskip-v4 PongNoFrameskip-v4)
        flags=(--semantics cleanrl)  # budgets and hyper-parameters are CleanRL's by default
        seeds() {
            case $1 in
                Acrobot-v1) echo 20 ;;  # the number its margin takes, docs/curves.md
                *NoFrameskip-v4) echo 1 ;;
                *) echo 10 ;;
            esac
        }
        atari_stop=1000000
        ;;
    dqn)
        envs=(CartPole-v1 Acrobot-v1 PongNoFrameskip-v4)
        flags=()
        seeds() { [[ $1 == *NoFrameskip-v4 ]] && echo 1 || echo 10; }
        atari_stop=1500000  # CleanRL's own curve has hardly left its start before
        ;;
    c51)
        envs=(CartPole-v1)
        flags=()
        seeds() { [[ $1 == *NoFrameskip-v4 ]] && echo 1 || echo 10; }
        atari_stop=1500000
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

run_folders() { compgen -G "runs/$algo/${name}__${algo}__*"; }
finished() { for folder; do [[ -f $folder/model.safetensors ]] || return; done; }
stop=${ATARI_STOP:-${atari_stop:-0}}

for env in "${envs[@]}"; do
    echo "=== $algo on $env"
    name=${env//[\/:]/-}  # as folders and files are named
    if compgen -G "runs/results/$algo/*__$name.csv.gz" > /dev/null; then
        echo "results are kept; to train again remove runs/results/$algo/*__$name.* and runs/$algo/${name}__*"
        continue
    fi
    mapfile -t folders < <(run_folders)
    until=()
    [[ $env == *NoFrameskip-v4 ]] && until=(--stop-at "$stop")
    if ((${#folders[@]} == 0)); then
        "$python" -m "rl_lab.$algo" --env "$env" "${flags[@]}" --num-seeds "$(seeds "$env")" --runs-dir "runs/$algo" \
            "${until[@]}"
        mapfile -t folders < <(run_folders)
    elif ! finished "${folders[@]}"; then
        "$python" -m "rl_lab.$algo" --resume "${folders[0]}" "${until[@]}"
    fi
    # 0 to 3 are verdicts, and a verdict is a finding; anything else is a fault.
    "$python" -m rl_lab.compare "${folders[@]}" --report "runs/$algo/$name.html" || (($? <= 3))
    "$python" -m rl_lab.curves.summary "$algo" "${folders[@]}"
done
