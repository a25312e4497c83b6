"""Fine-tuning at long context, with the compressed cache in the loop."""
