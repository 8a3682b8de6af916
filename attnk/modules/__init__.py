"""The modules people put into networks, under the names and keys they already use."""
