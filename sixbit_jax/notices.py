"""Notices of other packages that do not concern our users."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def without_torch_notice() -> Iterator[None]:
    """Holds back the one line in which transformers, imported inside, says that there is no PyTorch.

    This package uses its tokenizers alone. Every other record of the same logger passes.
    """

    def concerns_us(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("PyTorch was not found")

    logger = logging.getLogger("transformers")
    logger.addFilter(concerns_us)
    try:
        yield
    finally:
        logger.removeFilter(concerns_us)
