"""What is learned: see objective.py for what an objective is."""
