"""What the commands share: how they start and end, and the flags that several of them have."""
