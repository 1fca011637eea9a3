"""Models from elsewhere made into checkpoints, and a checkpoint's task made into a stock Transformers model."""
