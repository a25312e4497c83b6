"""`d2o-dist COMMAND ...`: what needs no launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from d2o_dist.cli import convert, plan, profile

COMMANDS = {"convert": convert.main, "plan": plan.main, "profile": profile.main}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments on to the command; its exit status, or 2 for one that there is not."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    asked = argv[:1] in (["-h"], ["--help"])
    print(f"usage: d2o-dist {{{','.join(COMMANDS)}}} ...", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
