"From files to image sets: decoded, split by patient, augmented, audited."
from .sources import load

__all__ = ["load"]
