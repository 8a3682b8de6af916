"""What changes a user's model: a copy that computes the same with less, modules inserted and taken out again."""
