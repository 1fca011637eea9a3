"""What computes: a protocol and its implementations. Nothing above this folder knows a framework."""
