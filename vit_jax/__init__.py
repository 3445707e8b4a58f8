"""Vision Transformers in JAX and Flax: pretrain, fine-tune, evaluate and predict."""

__version__ = "0.1.0"
