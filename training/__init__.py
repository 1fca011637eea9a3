"""Training: a YAML file to a sealed multitask checkpoint. `mtserve` never imports this package."""
