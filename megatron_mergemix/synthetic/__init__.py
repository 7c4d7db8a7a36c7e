"""Surfaces and items with a known optimum, by which searches are judged in benchmarks and tests."""
