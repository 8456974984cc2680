"""Attention backends: each reads K/V through the per-segment tables."""
