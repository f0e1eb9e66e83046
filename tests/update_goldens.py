"""Shows how the compiler's golden files would change, and with --write changes them: python tests/update_goldens.py"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from support.drawings import GOLDENS, renewed


def main() -> None:
    """Prints the differences."""
    for path in sorted(GOLDENS.glob("*/*.txt")):
        old = path.read_text()
        new = renewed(old)
        name = str(path.relative_to(GOLDENS))
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, name))
        if "--write" in sys.argv[1:]:
            path.write_text(new)


if __name__ == "__main__":
    main()
