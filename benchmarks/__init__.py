"""How fast taskckpt is, next to others: ``make bench``. See README.md beside this file."""
