"""Speed and memory compared with other implementations; see README.md here."""
