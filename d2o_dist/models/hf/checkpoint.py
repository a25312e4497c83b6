"""Whether a checkpoint holds what its model needs: transformers makes up at random what is missing, and goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from d2o_dist.models.unfit import refuse_keys

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
    refuse_keys(
        f"the weights of {name} do not fit its config.json",
        missing=found["missing_keys"],
        unexpected=found["unexpected_keys"],
        other=found["mismatched_keys"],
    )


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
