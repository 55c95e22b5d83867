"""`python tools/engine_table.py [--write]`: which engine has what, as the cross-checks say; into README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from megads.assemble.engine_table import markdown, replace_block

README = Path(__file__).parents[1] / "README.md"


def main() -> int:
    """Print the table, or put it into README.md."""
    parser = argparse.ArgumentParser(
        description="The table of engines of README.md, made from the cross-checks."
    )
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if parser.parse_args().write:
        README.write_text(replace_block(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
