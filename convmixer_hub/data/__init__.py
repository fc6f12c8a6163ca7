"""Datasets of images: reading them from disk, and augmentation."""
