"From image to logits: CRNet, and heads that are sentences."
from .models import HEADS, classifier
from .crnet import CRNet
from .scan import SCANS

__all__ = ["HEADS", "SCANS", "CRNet", "classifier"]
