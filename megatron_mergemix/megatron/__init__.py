"""Megatron Core: the only room that imports it."""
