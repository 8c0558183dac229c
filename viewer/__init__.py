"""Show predictions: the report, the list of label errors, the browser app."""
