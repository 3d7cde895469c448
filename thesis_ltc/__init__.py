"""Neural circuit policies of liquid time-constant neurons as the head of a CNN, against fully connected layers.

`thesis_ltc.heads` has CRNet and `classifier`; `thesis_ltc.ltc` has `LTC`, `ncp`, `accelerate` and `DropIn`;
`thesis_ltc.data` has `load`; `thesis_ltc.study` has `Experiment`, `run` and `run_seeds`; `thesis_ltc.book`
has `load_records`. `accelerate` and `DropIn` are also here.
"""
__version__ = "0.1.0"


def __getattr__(name: str):
    "`thesis_ltc.accelerate` and `thesis_ltc.DropIn`, which need PyTorch, are imported when they are asked for."
    if name in ("accelerate", "DropIn"):
        from .ltc import drop_in
        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
