"""HieraSparse for vLLM: older KV pages in 2:4 form, attended as they are stored."""

__version__ = "0.1.0"
