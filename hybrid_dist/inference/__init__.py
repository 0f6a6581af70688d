"""A trained model in use: found, opened, asked, judged on other data, exported."""
