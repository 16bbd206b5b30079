"""MixFlow training (arXiv 2512.19311): the method, its networks, samplers, metrics and pipeline stages."""

__version__ = "0.1.0"
