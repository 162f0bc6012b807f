__version__ = "0.1.0"

from . import core as core, released as released  # importing the package makes the models known to timm
