"""Real photos for training and evaluation; imports nothing else of this package."""
