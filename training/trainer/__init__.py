"""The Trainer of several tasks and its parts. Knows no formats, no metrics and no checkpoints."""
