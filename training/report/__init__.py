"""What a run tells: metrics, the model card, pictures and tables. Trains nothing."""
