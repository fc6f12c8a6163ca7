"""What is published with a model: card, reference logits, the upload itself."""
