"Experiments, their runs and records, and the studies that ask for them."
from .experiment import Experiment
from .runs import run, run_seeds

__all__ = ["Experiment", "run", "run_seeds"]
