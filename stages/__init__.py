"""The runnable stages, one file per command; `logit-cache` and `python -m logit_cache` start them."""
