"""Parts that do not depend on networks: atomic files, locks, caches, errors."""
