"""The report, the list of label errors and the browser app."""
