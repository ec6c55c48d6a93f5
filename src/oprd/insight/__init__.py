"""What a run looked like: plots and tables."""
