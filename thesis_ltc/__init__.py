__version__ = "0.1.0"


def __getattr__(name: str):
    "`thesis_ltc.accelerate`, which needs PyTorch, is imported when it is asked for."
    if name == "accelerate":
        from .drop_in import accelerate
        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
