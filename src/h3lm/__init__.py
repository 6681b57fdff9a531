"""State space language models that people use: H3, its hybrids, and FlashConv."""

__version__ = "0.1.0"
