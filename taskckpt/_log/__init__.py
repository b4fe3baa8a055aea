"""A task's log: its records, who reads it, who writes it, and what stays."""
