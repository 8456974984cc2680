"""Puts an engine together for one model on one machine."""
