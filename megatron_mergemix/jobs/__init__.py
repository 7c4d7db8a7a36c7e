"""What every rank of a job does; ``worker.py`` is such a rank where the trainer is our own."""
