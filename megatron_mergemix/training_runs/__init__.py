"""The training runs of an experiment: which there are, what they learn from, which are done."""
