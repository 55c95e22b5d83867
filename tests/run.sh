#!/usr/bin/env bash
# All tests, from a fresh clone. --all adds the slow ones. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
export OMP_NUM_THREADS=1
SLOW=(-m "not slow and not gpu")
if [ "${1:-}" = --all ]; then
    SLOW=(-m "not gpu")
    shift
fi
exec "$PYTHON" -m pytest "${SLOW[@]}" "$@"
