"""What `mergemix diagnose` says of merges: theory, limits, and the record of what was measured."""
