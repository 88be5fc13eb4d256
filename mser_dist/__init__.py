"""Zero-shot multilingual speech emotion recognition: contrastive alignment, then a whole LLM, on clusters."""

__version__ = "0.1.0"
