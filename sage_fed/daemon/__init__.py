"""The daemon: builds every part, serves, and stops in order.

Import from here: `serve`.
"""

from sage_fed.daemon.daemon import serve

__all__ = ["serve"]
