"""Serving: ours beside other servers of the same models, over loopback, by load from a process of its own."""
