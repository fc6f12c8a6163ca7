"""Files of weights: reading, checking, adapting, converting and saving them."""
