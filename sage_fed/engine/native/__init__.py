"""CPU kernels of our own: C++ sources, their build at first use, and the forward pass on them.

`load_library` compiles (or finds) the kernels, or says why this machine cannot have them.
"""

from sage_fed.engine.native.library import Library, Unavailable, load_library

__all__ = ["Library", "Unavailable", "load_library"]
