"""What people read: text for the terminal and self-contained pages."""
