"""How good a model is: perplexity of text, loss and exact match on records."""
