"""The runnable stages, one file per command; `logit-cache` and `python -m stages` start them."""
