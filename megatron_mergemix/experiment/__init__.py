"""What the search of an experiment stands on and has found, and the models that it names."""
