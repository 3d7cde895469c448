"The liquid circuit, by itself: wirings, the LTC network, its kernels, and faster drop-ins for ncps."
from .drop_in import DropIn, accelerate
from .network import LTC
from .wiring import from_ncps, ncp

__all__ = ["LTC", "DropIn", "accelerate", "from_ncps", "ncp"]
