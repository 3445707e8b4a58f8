"""Looking inside a network: its filters, position embeddings and attention."""
