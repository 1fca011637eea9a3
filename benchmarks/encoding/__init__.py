"""Speed, agreement and memory of one encoder on a CPU: ours beside peers, and beside what the machine can do."""
