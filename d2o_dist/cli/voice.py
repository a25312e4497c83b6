"""One rank speaks: what libraries say on the others is left out. Errors are not: they are raised, not said."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, NoReturn

from d2o_dist.comm.agreement import AgreedError
from d2o_dist.comm.launch import Launch, RankError
from d2o_dist.fields.show import clip
from d2o_dist.models import loading

if TYPE_CHECKING:
    import argparse


def speaks_of(error: Exception, launch: Launch, *, met: bool) -> bool:
    """Whether this rank says what is wrong.

    Args:
        met: whether the ranks agree on what is wrong, because they have met.
    """
    if isinstance(error, RankError):
        return True
    # Before ranks have met, one of each machine speaks: what is wrong may be wrong there only.
    return (launch.rank if met or isinstance(error, AgreedError) else launch.local_rank) == 0


@contextmanager
def quiet_unless(speaks: bool) -> Iterator[None]:
    """On ranks that do not speak: no progress bars and no warnings of model libraries, no Python warnings."""
    if speaks:
        yield
        return
    with loading.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse_once(parser: argparse.ArgumentParser, argv: Sequence[str] | None, speaks: bool) -> argparse.Namespace | int:
    """The arguments, or the exit status where there is nothing to run: one rank explains, a wrong flag in one line."""

    def refuse(message: str) -> NoReturn:
        parser.exit(2, f"{parser.prog}: error: {clip(message, 300)}; --help lists what there is\n")

    parser.error = refuse
    try:
        if speaks:
            return parser.parse_intermixed_args(argv)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parser.parse_intermixed_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
