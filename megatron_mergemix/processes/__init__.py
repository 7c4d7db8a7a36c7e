"""Ranks that agree, errors that outlive them, and processes that end with their parents."""
