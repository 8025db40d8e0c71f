"""What people read: the templates of all pages, their styles and scripts, and what puts them together."""
