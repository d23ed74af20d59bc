"""The same products by other libraries."""
