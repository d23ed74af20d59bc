"""What the pages of the documentation say, computed."""
