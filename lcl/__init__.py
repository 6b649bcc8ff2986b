"""lcl: long-context continual learning, JAX/TPU-native.

The rooms are sub-packages (`lcl.data`, `lcl.models`, ...); this file imports none of them,
so that `import lcl` costs nothing and a tool that only tokenises text never loads JAX.
"""

__version__ = "0.1.0"
