#!/usr/bin/env bash
# On a GPU machine, from the repository's root: kernels built if they are not there, GPU tests, benchmarks.
# About 20 minutes on an H100; words choose parts: gpu_all.sh tests step. Logs also go to $OUT if it is set. A part that
# fails does not stop the next.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
LOGS=${OUT:-build}
mkdir -p "$LOGS"
FAILED=()
CHOSEN=$*

part() { # name, seconds, command ...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    [[ -z $CHOSEN || " $CHOSEN " == *" $name "* ]] || return
    echo "== $name: $*"
    timeout "$seconds" "$@" >"$LOGS/$name.log" 2>&1 || FAILED+=("$name ($?)")
    tail -n "${LINES_SHOWN:-45}" "$LOGS/$name.log"
    echo "== $name took $((SECONDS - start)) s"
}

[ -f megads/ops/_csrc.so ] || CHOSEN= part build 120 "$PYTHON" setup.py build_ext --inplace
part tests 540 "$PYTHON" -m pytest -m gpu tests/gpu -p no:cacheprovider --tb=short
part norm 120 "$PYTHON" -m tools.bench.norm
part experts 120 "$PYTHON" -m tools.bench.experts
part context 90 "$PYTHON" -m tools.bench.context
export PYTORCH_CUDA_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8 # offload pins fast
part memory 330 "$PYTHON" -m tools.bench.memory
unset PYTORCH_CUDA_ALLOC_CONF
part generate 120 "$PYTHON" -m tools.bench.generate
part step 330 "$PYTHON" -m tools.bench.step
[ ${#FAILED[@]} -eq 0 ] || { echo "failed: ${FAILED[*]}"; exit 1; }
