"""What is computed: the networks, from one table of variants."""
