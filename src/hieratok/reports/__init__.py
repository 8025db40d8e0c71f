"""What people read: pages and model cards, made of templates, styles and scripts that are files of this package."""
