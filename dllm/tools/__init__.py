"""Commands that look at runs, corpora and models, and one that looks for a learning rate."""
