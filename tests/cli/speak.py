"""What a program says."""

from __future__ import annotations

import contextlib
import io


def speak(main, argv) -> tuple[int, str, str]:
    """Status, standard output, standard error of a program."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(argv)
    return status, out.getvalue(), err.getvalue()
