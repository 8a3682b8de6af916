"""What looks into a model: its attention as maps and pictures, and what is wrong with it."""
