"""A comparison as an HTML page and as tables on a terminal."""
