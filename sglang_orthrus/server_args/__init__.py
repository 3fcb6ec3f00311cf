"""What users may ask of a server: its arguments, and the options of requests."""
