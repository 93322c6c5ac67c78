"""The embedded default: a tiny world, the models that draw and judge it, and what made them."""
