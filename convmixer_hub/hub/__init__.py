"""From the name of a trained model to a verified file on this machine."""
