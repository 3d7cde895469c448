__version__ = "0.1.0"


def __getattr__(name: str):
    "`thesis_ltc.accelerate` and `thesis_ltc.DropIn`, which need PyTorch, are imported when they are asked for."
    if name in ("accelerate", "DropIn"):
        from .ltc import drop_in
        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
