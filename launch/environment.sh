# Sourced by the scripts that set themselves up: leaves $PYTHON, an interpreter that can import megads.
# An active environment with torch is used as it is; otherwise .venv in the checkout is made, once.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
if python3 -c 'import torch' 2>/dev/null; then
    PYTHON=$(command -v python3)
else
    [ -x .venv/bin/python ] || python3 -m venv .venv
    PYTHON=$ROOT/.venv/bin/python
fi
STAMP=$("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha1(open("setup.py", "rb").read() + sys.prefix.encode()).hexdigest())')
if [ ! -f "build/installed-$STAMP" ]; then
    echo "setting up $PYTHON (once)" >&2
    # torch comes first and pinned: a looser request pulls gigabytes of CUDA packages onto a machine without a GPU
    "$PYTHON" -c 'import torch' 2>/dev/null || "$PYTHON" -m pip install -q torch==2.13.0
    "$PYTHON" -m pip install -q -e ".[dev]"
    mkdir -p build && touch "build/installed-$STAMP"
fi
export PYTHON
