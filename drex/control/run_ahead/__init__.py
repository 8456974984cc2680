"""Tentative tokens: drafted while a request waits, then verified or taken back."""
