"""The embedded default: a verifiable task, a student and a teacher that fit in a few hundred kilobytes."""
