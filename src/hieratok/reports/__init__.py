"""Pages and model cards, from templates, styles and scripts of this package."""
