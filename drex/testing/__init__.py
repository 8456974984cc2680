"""Models to test with, made on the spot."""
