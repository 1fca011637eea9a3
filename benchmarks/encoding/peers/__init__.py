"""What encodes: one file an engine, ours among them. Each runs in a process of its own, by the Python that has it."""
