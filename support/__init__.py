"""What the six files at the top need and a reader of the paper does not, a concept a file."""
