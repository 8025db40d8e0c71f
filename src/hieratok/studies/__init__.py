"""The paper's experiments: recipes, and tables and figures as rows with the paper's numbers."""
