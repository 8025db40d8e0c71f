"""hieratok: the multi-scale visual tokenizer of HieraTok (arXiv 2509.23736)."""
