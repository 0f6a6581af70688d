"""CSV row → sample → batch; and pictures rendered for trying things out."""
