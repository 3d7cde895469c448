"Losses, checkpoints, the training loop, frozen trunks, and many seeds in one step."
from .checkpoint import CheckpointError, RunIsBusy
from .imprint import replay
from .inputs import Images, predict
from .loop import Interrupted, NonFinite, fit, fit_all, interruptible
from .objective import OBJECTIVES, SETTINGS, score
from .recipe import (
    MEMORY_FORMATS,
    Recipe,
    autocast,
    best_epoch,
    reproducible,
    resolve_device,
    resolve_precision,
    scheduled_rate,
    stop_reason,
)
from .resume import load_best
from .stacked import StackedLearner, learner_of
from .steps import Learner, Training
from .trunk import Trunk, TrunkError, features_of, read_trunk

__all__ = [
    "MEMORY_FORMATS", "OBJECTIVES", "SETTINGS", "CheckpointError", "Images", "Interrupted", "Learner",
    "NonFinite", "Recipe", "RunIsBusy", "StackedLearner", "Training", "Trunk", "TrunkError", "autocast",
    "best_epoch", "features_of", "fit", "fit_all", "interruptible", "learner_of", "load_best", "predict",
    "read_trunk", "replay", "reproducible", "resolve_device", "resolve_precision", "scheduled_rate", "score",
    "stop_reason",
]
