"""The OpenAI-compatible server. Its libraries (`pip install "drex[server]"`) are imported here only."""
