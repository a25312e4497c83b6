"""Whether a checkpoint holds what its model needs: transformers makes up at random what is missing, and goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# How many names an error shows of each kind.
_SHOWN = 3
_LOGGER = "transformers.modeling_utils"
_REPORT = "LOAD REPORT"


def check_keys(name: str, found: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the model.

    Args:
        name: of the model, for the message.
        found: what `from_pretrained(..., output_loading_info=True)` says, from which transformers has taken weights
            that are tied, and keys that the architecture declares to be ignorable.

    Raises:
        ValueError: keys are missing, unexpected or of another shape; it names some of each kind and says how many.
    """
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    other = [
        f"{key}: {list(stored)} in the file, {list(wanted)} in the model"
        for key, stored, wanted in sorted(found["mismatched_keys"])
    ]
    kinds = [(missing, "missing"), (unexpected, "unexpected"), (other, "of another shape")]
    wrong = [f"{len(keys)} {'is' if len(keys) == 1 else 'are'} {kind} ({_some(keys)})" for keys, kind in kinds if keys]
    if wrong:
        raise ValueError(f"the weights of {name} do not fit its config.json: of their keys {', '.join(wrong)}")


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


@contextmanager
def without_report() -> Iterator[None]:
    """A block in which transformers' table of such keys is held back, because `check_keys` follows.

    If the block raises, the error may refer to the table: it is shown then.
    """
    logger, held = logging.getLogger(_LOGGER), []

    def hold(record: logging.LogRecord) -> bool:
        if _REPORT not in record.getMessage():
            return True
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    except BaseException:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)
