"""From a source to the features of a task's splits, each step once. Knows no model and no training."""
