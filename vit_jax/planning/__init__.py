"""What a compiled program needs and how long it may take, read off without running it."""
