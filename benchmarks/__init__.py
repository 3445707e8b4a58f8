"""Speed and memory side by side with other implementations; see README.md here."""
