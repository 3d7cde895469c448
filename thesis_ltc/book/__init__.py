"From records to pages: tables, verdicts, figures, and the build of the book."
from .records import load_records

__all__ = ["load_records"]
