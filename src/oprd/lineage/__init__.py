"""Where a student came from, whether it may be used, and how to go back."""
