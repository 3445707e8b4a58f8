"""Other people's weights: reading, writing, and fitting them to a model of ours."""
