"""Mixtures on the simplex: bounds, point sets, and the merge weights that stand for them."""
