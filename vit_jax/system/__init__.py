"""What knows nothing of networks: files that are whole or not there, locks, caches, errors."""
