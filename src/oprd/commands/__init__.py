"""One file a command: its words, and the call behind them. Nothing heavy is imported before a command runs."""
