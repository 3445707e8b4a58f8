"""From a decoded image to the pixels of an example, on the host."""
