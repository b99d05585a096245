"""MUSIC: self-supervised pre-training of vision backbones, in JAX.

MUlti-Segmental Informational Coding, Niu & Wang, arXiv 2206.06461 (2022).
"""

__version__ = "0.1.0"
