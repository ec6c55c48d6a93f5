"""From a recipe to a better student: configuration, data, pre-flight, the trainer and the run around it."""
