"From records to pages: tables, verdicts, figures, and the build of the book."
from typing import Any

__all__ = ["load_records"]


def __getattr__(name: str) -> Any:
    "`load_records` is imported when it is asked for: to start the build, nobody waits for pandas and PyTorch."
    if name == "load_records":
        from .tables import load_records
        return load_records
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
