"""What connectivity looks like: statistics, figures, and pages to explore it."""
