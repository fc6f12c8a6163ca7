"""Images on disk, as models take them."""
