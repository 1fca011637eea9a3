"""Stock Transformers task models around one trunk, as the write-ups call them. Knows no kinds but to seal them."""
