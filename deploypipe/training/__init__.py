"""Fine-tuning, evaluation, checkpoints."""
