"""Show, verify or compare checkpoints: `python tools/inspect_checkpoint.py DIR [--diff OTHER] [--verify]`.

The work is done in `megads/checkpoint/describe.py`; no torch is needed. Exit codes: 0 done, 1 `--diff` found
differences, 2 a wrong input or damage.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megads.checkpoint.describe import main
from megads.errors import MegadsError

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MegadsError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
