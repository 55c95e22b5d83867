"""Convert a checkpoint: `python tools/convert_checkpoint.py SRC DST --to megads|hf|megatron|deepspeed`.

The work is in megads/assemble/convert.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from megads.assemble.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
