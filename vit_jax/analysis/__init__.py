"""Looking inside a network: what its filters, positions and attention have become."""
