"""``mergemix plan``: what an experiment will do and cost; start with ``make.py``."""
