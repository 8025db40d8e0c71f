"""Pages that show runs and results."""
