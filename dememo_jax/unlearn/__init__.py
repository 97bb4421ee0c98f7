"""Make a trained model forget: methods over masks of the examples to forget."""

from dememo_jax.unlearn.descent import Term, descent, finetune, gradient_ascent, retrain

__all__ = ["Term", "descent", "finetune", "gradient_ascent", "retrain"]
