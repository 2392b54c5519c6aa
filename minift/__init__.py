"""minift: fine-tuning of large language models, every mechanism written out."""

__version__ = "0.1.0"
