#!/usr/bin/env bash
# The main job on a laptop, from nothing: text -> tokenizer -> corpus -> train -> stop -> resume elsewhere -> evaluate.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" tools/quickstart.py "$@"
