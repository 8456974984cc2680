"""How to install what an optional part of drex needs: from a clone, for on PyPI drex is another package."""

INSTALL_SERVER = 'pip install ".[server]" in a clone of drex'
