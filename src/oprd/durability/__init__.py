"""What survives a kill: folders that appear whole or not at all, states without pickles, and signals that are obeyed in time."""
