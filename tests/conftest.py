"""What holds for the whole run of the tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Thousands of tests that live until the end are nothing to look through again and again."""
    gc.collect()
    gc.freeze()
