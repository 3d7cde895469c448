"From records to pages: records, tables, verdicts, figures, and the build of the book."
from typing import Any

__all__ = ["load_records"]


def __getattr__(name: str) -> Any:
    "`load_records`, imported when it is asked for: whoever starts a kernel need not wait for pandas and PyTorch."
    if name == "load_records":
        from .records import load_records
        return load_records
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
