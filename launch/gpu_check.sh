#!/usr/bin/env bash
# On a machine with a GPU: builds the CUDA kernels, tests them on it, and measures. Under nine minutes on an H100.
#
#   ./launch/gpu_check.sh
#   OUT=/a/folder PYTHON=/path/to/python3.12 ./launch/gpu_check.sh
#
# Installs nothing and needs no network: $PYTHON (python3) has torch with CUDA, pytest, hypothesis and setuptools >= 77,
# and nvcc is there. Peers are compared with where they are installed. One thing that fails does not stop the rest, and
# what there is no time for ($BUDGET_S seconds for all) is said. Leaves in $OUT, which is
# benchmarks/results/<date>_<gpu> unless said otherwise, the log of everything, and the results with their pictures, as
# benchmarks/results has them too. Ends with a table; the exit status is 1 if something failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-535}
export PYTHONPATH=$PWD TOKENIZERS_PARALLELISM=false

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || {
    printf 'error: the torch of %s sees no GPU; %s\n' "$PYTHON" \
        'this checks and measures what runs on one, so there is nothing to do.' >&2
    exit 2
}
{ read -r hardware && read -r arch; } < <("$PYTHON" -c '
import sys, torch
sys.path.insert(0, "benchmarks")
from results import describe_machine
print(describe_machine()["hardware"])
print("{}.{}".format(*torch.cuda.get_device_capability()))')
name=$(date +%F)_$hardware
OUT=${OUT:-benchmarks/results/$name}
LOG=$OUT/log.txt
mkdir -p "$OUT"
: >"$LOG"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

started=0 shown=0 failed=0

tell() { printf '%s\n' "$@" | tee -a "$LOG"; }

run() { # run PART SECONDS NAME COMMAND...: what became of it goes to PART.verdict, what it said to PART.log
    local part=$1 limit=$2 name=$3 status=0 began=$SECONDS left=$((BUDGET_S - SECONDS)) verdict=ok
    shift 3
    [ "$limit" -lt "$left" ] || limit=$left
    printf '$ %s\n' "$*" >"$part.log"
    if [ "$left" -lt 10 ]; then
        verdict='skipped: no time is left'
    else
        timeout --kill-after=5 "$limit" "$@" >>"$part.log" 2>&1 </dev/null || status=$?
        case $status in
            0) ;;
            124 | 137) verdict="FAILED: not done after $limit s" ;;
            *) verdict="FAILED: ended with status $status" ;;
        esac
    fi
    printf '%6d s   %-56s %s\n' $((SECONDS - began)) "$name" "$verdict" >"$part.verdict"
}

start() { # start SECONDS NAME COMMAND...: beside others
    started=$((started + 1))
    run "$parts/$(printf '%03d' $started)" "$@" &
}

finish() { # waits for all that was started and tells, in this order, what became of them
    local part
    wait
    while [ "$shown" -lt "$started" ]; do
        shown=$((shown + 1))
        part=$parts/$(printf '%03d' $shown)
        cat "$part.verdict"
        { cat "$part.verdict" "$part.log"; echo; } >>"$LOG"
        if grep -q FAILED "$part.verdict"; then
            failed=$((failed + 1))
            tail -n 20 "$part.log" | sed 's/^/    | /'
        fi
    done
}

one() { # one SECONDS NAME COMMAND...: by itself
    start "$@"
    finish
}

# --------------------------------------------------------------------------------------------------------------- build

tell "=== $hardware (compute capability $arch), results go to $OUT"
one 30 'what is here' "$PYTHON" -c '
import importlib.util, shutil, subprocess, sys, setuptools, torch
print(sys.version, "setuptools", setuptools.__version__, "torch", torch.__version__, torch.cuda.get_device_name())
for peer in ("bitsandbytes", "transformers", "peft", "triton", "cudnn"):
    print(peer, "is here" if importlib.util.find_spec(peer) else "is missing: not compared with")
if shutil.which("nvidia-smi"):
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
    subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"])
'
grep '^[a-z]* is missing' "$parts/001.log" || true

tell '=== build'
# Where g++ links libstdc++ statically, what an op raises would cross two C++ runtimes, which ends the process.
runtime=$({ PATH=$PATH:/sbin:/usr/sbin ldconfig -p || true; } 2>/dev/null |
    awk '$1 == "libstdc++.so.6" && /x86-64/ { path = $NF } END { print path }')
export LDFLAGS="${LDFLAGS-${runtime:+-Wl,--no-as-needed $runtime}}"
one 240 'build with CUDA' env USE_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" MAX_JOBS="$(getconf _NPROCESSORS_ONLN)" \
    "$PYTHON" setup.py build_ext --inplace
one 30 'the extension has CUDA kernels' "$PYTHON" -c '
import torch
from minift.ops import extension
names = [name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if name.startswith("minift::")]
print(extension.MISSING_REASON, sorted(names))
raise SystemExit(not names)'

# --------------------------------------------------------------------------------------------------------------- tests

tell '=== tests, side by side'
pytest() { # pytest SECONDS NAME ARGUMENTS...
    local limit=$1 name=$2
    shift 2
    start "$limit" "$name" env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider "$@"
}
for file in $(grep -l '^HAS_CUDA_KERNELS = True' tests/ops/test_*.py); do # their names have no spaces
    pytest 150 "$(basename "$file" .py) on the GPU" "$file" -k 'cuda and not cuda_on_cpu'
done
export MINIFT_TEST_DEVICE=cuda
pytest 180 'engine: gradients' tests/fsdp/test_engine.py -k 'gradients and not same_bits'
pytest 150 'engine: bits' tests/fsdp/test_engine.py -k 'gradients and same_bits'
pytest 150 'engine: steps' tests/test_step.py
pytest 60 'gradient slots' tests/test_grad_slot.py
pytest 150 'engine: NCCL' tests/fsdp/test_nccl.py
pytest 150 'host memory' tests/test_pinned.py -k gpu
pytest 150 'host memory: moments' tests/optim/test_memory.py -k gpu
unset MINIFT_TEST_DEVICE

sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
    # Every tensor is an allocation of its own then, so that the first byte behind it is noticed.
    for tool in memcheck racecheck; do
        start 180 "compute-sanitizer: $tool" env OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 "$PYTHON" -m tests.ops.small_cases
    done
else
    tell '(compute-sanitizer is missing: bad accesses are not looked for)'
fi
finish

# ---------------------------------------------------------------------------------------------------------- benchmarks

tell '=== benchmarks, one after the other'
one 150 'ops' "$PYTHON" benchmarks/ops_cuda.py --write --busy
step() { # step SECONDS NAME OPTIONS...
    local limit=$1 name=$2
    shift 2
    one "$limit" "$name" "$PYTHON" benchmarks/step_cuda.py "$@" --write --busy
}
# What bars are about comes first: time may end.
HALF=(--recompute full --offload-frozen '[13579]$') # the frozen weights of every other block
step 120 'steps: 8B LoRA, and PEFT' --model llama-3.1-8b --method lora --peer peft
step 60 'steps: 1B full, cheap ones recomputed, and fully_shard' --model llama-3.2-1b --method full \
    --peer fully_shard --recompute selective
step 100 'steps: 8B LoRA, half of the weights on the host, PEFT' --model llama-3.1-8b --method lora --peer peft \
    "${HALF[@]}"
step 40 'steps: 8B QLoRA, cheap ones recomputed' --model llama-3.1-8b --method qlora --peer none --recompute selective
step 100 'steps: 8B QLoRA, all recomputed, and PEFT' --model llama-3.1-8b --method qlora --peer peft --recompute full
step 40 'steps: 3B full' --model llama-3.2-3b --method full --peer none
step 40 'steps: 8B QLoRA' --model llama-3.1-8b --method qlora --peer none
step 60 'steps: 1B full, and fully_shard' --model llama-3.2-1b --method full --peer fully_shard
step 90 'steps: 8B LoRA, half of the weights on the host, or none' --model llama-3.1-8b --method lora --peer resident \
    "${HALF[@]}"
step 60 'steps: 8B LoRA, all recomputed, and PEFT' --model llama-3.1-8b --method lora --peer peft --recompute full

for file in "benchmarks/results/${name}"_*; do
    if [ -e "$file" ]; then cp "$file" "$OUT/"; fi
done

tell '' "=== all of it, in $SECONDS s"
cat "$parts"/*.verdict | tee -a "$LOG"
grep -h -E '^(met|MISSED|minift|peft|fully_shard|resident) ' "$parts"/*.log | tee -a "$LOG" || true
[ "$failed" -eq 0 ] || {
    tell "$failed of these failed; $LOG says why."
    exit 1
}
