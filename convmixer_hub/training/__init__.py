"""Training and fine-tuning, with runs that can be resumed."""
