"""The OpenAI-compatible server. Its libraries (the extra `server`) are imported here only."""
