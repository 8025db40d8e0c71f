"""The paper's experiments: recipes, tables and figures as rows with the paper's numbers, and what runs them."""
