#!/usr/bin/env bash
# Trains a recipe on this machine with one process per GPU, or with two processes where there is none.
#
#   ./launch/torchrun.sh launch/recipes/sft_lora.yaml --optim.lr 1e-4
#   PROCESSES=4 ./launch/torchrun.sh launch/recipes/sft_lora.yaml
#
# Several machines: on each of them, with the same HEAD (host:port of the first one, reachable from all) and MACHINES:
#
#   MACHINES=2 HEAD=node0:29500 ./launch/torchrun.sh launch/recipes/sft_full.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
[ -x .venv/bin/torchrun ] && PATH=$PWD/.venv/bin:$PATH

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}

if [ -n "${HEAD:-}" ]; then
    where=(--nnodes "${MACHINES:?how many machines take part}"
        --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id minift)
else
    where=(--standalone) # a free port of its own, so that two runs on one machine do not meet
fi
exec torchrun "${where[@]}" --nproc-per-node "$processes" -m minift train "$@"
