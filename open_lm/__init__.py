"""open_lm: train and evaluate dense and mixture-of-experts language models."""

__version__ = "0.1.0"
