"""`hybrid-dist bench`: figures as ratios, ours and what people use now measured in one run."""
