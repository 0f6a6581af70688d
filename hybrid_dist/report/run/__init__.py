"""report.html: what a run's model can and can't do, on one page."""
