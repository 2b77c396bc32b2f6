"""`python -m logit_cache COMMAND` and `torchrun -m logit_cache COMMAND`: the command line without its script."""

from .stages.app import run

run()
