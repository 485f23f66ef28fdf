"""The compiled module behind numpy.py, which spells out every argument."""

from typing import Any

def __getattr__(op: str) -> Any: ...
